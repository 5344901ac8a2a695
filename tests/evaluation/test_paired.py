"""Paired comparisons of an edited model with the unedited one: differences, their standard errors
and p.
"""

from __future__ import annotations

import math

import pytest

from editkit.evaluation.statistics.paired import (
    Part,
    aggregate,
    bootstrap,
    bootstrap_stderr,
    compare,
    compare_aggregates,
    mcnemar,
)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [(0, 0, 1.0), (0, 1, 1.0), (0, 5, 2 / 32), (1, 5, 2 * 7 / 64), (4, 4, 1.0)],
)
def test_mcnemars_test_is_exact(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(p_value)


def test_a_comparison_is_that_of_paired_differences() -> None:
    found = compare([1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0])
    assert found.difference == -0.5
    assert found.stderr == pytest.approx(math.sqrt(1 / 3) / 2)
    assert found.p_value == mcnemar(0, 2)
    assert compare([0.5], [math.nan]).p_value is None


def test_the_bootstraps_p_is_small_for_a_clear_shift_and_one_for_none() -> None:
    assert bootstrap([0.0] * 10) == 1.0
    assert bootstrap([0.3, 0.2, 0.4, 0.25] * 5) == pytest.approx(2 / 10001)
    assert bootstrap([-0.3, 0.3] * 20) > 0.5
    assert bootstrap([0.1, -0.05, 0.2]) == bootstrap([0.1, -0.05, 0.2])


def test_aggregates_are_compared_by_drawing_pairs_of_items() -> None:
    before, after = (
        [float(index % 5) for index in range(40)],
        [float(index % 5 + index % 3) for index in range(40)],
    )
    of_means = compare(before, after)
    assert of_means.difference is not None and of_means.stderr is not None
    for rule in (None, lambda scores: sum(scores) / len(scores)):
        found = compare_aggregates([Part(before=before, after=after, rule=rule)])
        assert (found.difference, found.stderr) == (
            pytest.approx(of_means.difference),
            pytest.approx(of_means.stderr, rel=0.1),
        )
        assert found.p_value == pytest.approx(2 / 1001)
        assert found == compare_aggregates([Part(before=before, after=after, rule=rule)])
    parts = [Part(before=before, after=after), Part(before=before, after=before, weight=3)]
    assert compare_aggregates(parts).difference == pytest.approx(of_means.difference / 4)
    assert compare_aggregates([Part(before=before, after=before, rule=max)]).p_value == 1.0
    assert compare_aggregates([Part(before=[1.0], after=[2.0], rule=max)]).p_value is None


def test_what_is_too_large_for_a_number_is_none() -> None:
    too_large = lambda scores: math.exp(-sum(scores))  # noqa: E731
    assert math.isnan(aggregate(too_large, [-800.0]))
    assert bootstrap_stderr([-800.0, -900.0], too_large) is None
    assert (
        compare_aggregates(
            [Part(before=[-1.0, -1.0], after=[-800.0, -900.0], rule=too_large)]
        ).difference
        is None
    )
    assert (
        compare_aggregates(
            [Part(before=[-1.0, -1.0], after=[math.inf, -1.0], rule=too_large)]
        ).difference
        is None
    )


def test_the_bootstraps_standard_error_of_a_mean_is_near_the_formulas() -> None:
    values = [float(index % 7) for index in range(50)]
    mean = sum(values) / 50
    formula = math.sqrt(sum((value - mean) ** 2 for value in values) / 49 / 50)
    assert bootstrap_stderr(values, lambda drawn: sum(drawn) / len(drawn)) == pytest.approx(
        formula, rel=0.2
    )
    assert bootstrap_stderr([1.0], sum) is None
