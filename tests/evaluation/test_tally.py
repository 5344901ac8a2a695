"""Statistics of tallies: the textbook's means and errors, whichever way prompts are averaged, and
intervals that cover.
"""

from __future__ import annotations

import math
import random
import statistics

import pytest

from editkit.evaluation.statistics.subsets import blocks, forgetting, known_before, succeeded
from editkit.evaluation.statistics.tally import (
    Aggregation,
    Metric,
    Outcome,
    Statistics,
    Tally,
    as_rows,
    from_rows,
    tally,
)
from editkit.records.means import harmonic_mean

EFFICACY, LOCALITY = Metric("argmax", "efficacy"), Metric("argmax", "locality")


def tallies(*requests: list[float]) -> list[Tally]:
    return [tally([Outcome(value) for value in values]) for values in requests]


def test_by_request_each_request_counts_the_same_and_by_prompt_each_prompt() -> None:
    found = tallies([1.0], [0.0, 0.0, 1.0], [])
    by_request = Statistics().estimate(found)
    by_prompt = Statistics(aggregation="prompt").estimate(found)
    assert by_request is not None and by_prompt is not None
    assert (by_request.value, by_request.n) == (pytest.approx(2 / 3), 2)
    assert by_request.stderr == pytest.approx(statistics.stdev([1.0, 1 / 3]) / math.sqrt(2))
    assert (by_prompt.value, by_prompt.n) == (0.5, 4)
    # Two clusters, whose sums deviate from what their prompts should give by 0.5 and -0.5: sqrt(2 /
    # 1 * (0.5**2 + 0.5**2)) / 4 prompts.
    assert by_prompt.stderr == pytest.approx(0.25)
    assert Statistics().estimate(tallies([], [])) is None


def test_what_is_not_finite_is_counted_by_request_or_by_prompt() -> None:
    found = [tally([Outcome(0.0, False), Outcome(0.0, False)]), *tallies([1.0])]
    assert [(each.nonfinite, each.value) for each in (Statistics().estimate(found),) if each] == [
        (1, 0.5)
    ]
    assert [
        each.nonfinite for each in (Statistics(aggregation="prompt").estimate(found),) if each
    ] == [2]
    for aggregation in ("request", "prompt"):
        estimate = Statistics(aggregation=aggregation, resamples=20).estimate(
            [tally([Outcome(math.nan, False)]), *tallies([1.0])]
        )  # type: ignore[arg-type]
        assert estimate is not None and (estimate.value, estimate.stderr, estimate.low) == (
            None,
            None,
            None,
        )


def test_rows_bring_tallies_back_bit_for_bit() -> None:
    found = [*tallies([0.1, 0.2], [], [1 / 3]), tally([Outcome(0.0, False)])]
    assert from_rows(as_rows(found)) == found
    assert as_rows([]).shape == (0, 3)


def test_bootstrap_intervals_are_those_of_the_normal_approximation_where_that_holds() -> None:
    rng = random.Random(0)
    found = tallies(*([float(rng.random() < 0.7)] for _ in range(400)))
    estimate = Statistics(resamples=2000).estimate(found)
    assert estimate is not None and estimate.value is not None and estimate.stderr is not None
    assert estimate.low == pytest.approx(estimate.value - 1.96 * estimate.stderr, abs=0.01)
    assert estimate.high == pytest.approx(estimate.value + 1.96 * estimate.stderr, abs=0.01)
    assert Statistics(resamples=2000).estimate(found) == estimate, (
        "the same scores give the same interval"
    )
    assert Statistics(resamples=50).estimate(tallies([1.0])) == Statistics().estimate(
        tallies([1.0])
    ), "one request tells nothing"


def test_bootstrap_by_prompt_draws_whole_requests() -> None:
    found = tallies(
        [1.0] * 50, [0.0] * 50
    )  # two requests, a hundred prompts: all that is known are two scores
    estimate = Statistics(aggregation="prompt", resamples=500).estimate(found)
    assert estimate is not None and (estimate.low, estimate.high) == (0.0, 1.0)


def test_by_prompt_the_error_is_that_of_drawing_whole_requests_as_the_interval_is() -> None:
    rng = random.Random(2)
    found = tallies(
        *([float(rng.random() < 0.5)] * rng.choice([1, 5]) for _ in range(300))
    )  # a request's prompts all say the same
    estimate = Statistics(aggregation="prompt", resamples=2000).estimate(found)
    assert (
        estimate is not None
        and estimate.stderr is not None
        and estimate.low is not None
        and estimate.high is not None
    )
    assert estimate.stderr == pytest.approx((estimate.high - estimate.low) / (2 * 1.96), rel=0.05)
    assert estimate.stderr > 1.8 * math.sqrt(0.25 / estimate.n), (
        "of independent prompts it would be the latter"
    )
    lone = Statistics(aggregation="prompt").estimate(tallies([1.0, 0.0]))
    assert lone is not None and lone.stderr is None, "one request tells nothing"


@pytest.mark.parametrize("aggregation", ["request", "prompt"])
def test_the_harmonic_mean_counts_what_its_smallest_part_does_and_has_an_error(
    aggregation: Aggregation,
) -> None:
    rng = random.Random(3)
    sizes = ((1, 1), (0, 3), (2, 2))  # prompts of a request, at least and at most
    groups = [
        tallies(*([float(rng.random() < 0.7)] * rng.randint(*size) for _ in range(2000)))
        for size in sizes
    ]
    groups[1][0] = Tally()  # not every request has a prompt for every part
    found = Statistics(aggregation=aggregation, resamples=2000).harmonic(groups)
    parts = [Statistics(aggregation=aggregation).estimate(each) for each in groups]
    assert (
        found is not None
        and found.stderr is not None
        and found.low is not None
        and found.high is not None
    )
    assert found.n == min(part.n for part in parts if part is not None) < 2001
    assert found.stderr == pytest.approx((found.high - found.low) / (2 * 1.96), rel=0.1)


def test_the_harmonic_means_error_is_that_of_its_linear_part() -> None:
    rng = random.Random(1)
    groups = [
        tallies(*([float(rng.random() < chance)] for _ in range(3000)))
        for chance in (0.9, 0.6, 0.8)
    ]
    found = Statistics(resamples=2000).harmonic(groups)
    assert (
        found is not None
        and found.value is not None
        and found.stderr is not None
        and found.high is not None
        and found.low is not None
    )
    means = [statistics.fmean(each.mean for each in group) for group in groups]
    assert found.value == pytest.approx(harmonic_mean(means))
    assert found.stderr == pytest.approx((found.high - found.low) / (2 * 1.96), rel=0.1)
    assert Statistics().harmonic([*groups, tallies(*[[]] * 3000)]) is None
    with_gap = Statistics().harmonic([groups[0][:2], groups[1][:1] + tallies([])])
    assert with_gap is None or with_gap.stderr is None


def test_blocks_hold_consecutive_edits_also_of_a_sample() -> None:
    judged = {
        EFFICACY: tallies([1.0], [0.0], [1.0], [1.0]),
        Metric("argmax", "efficacy_contains"): tallies([1.0], [1.0], [1.0], [1.0]),
    }
    found = [
        (each.metric.name, each.block, each.estimate.value, each.estimate.n)
        for each in blocks(judged, (1, 3, 4, 7), 3, Statistics())
    ]
    assert found == [
        ("efficacy", "1-3", 0.5, 2),
        ("efficacy", "4-6", 1.0, 1),
        ("efficacy", "7-9", 1.0, 1),
    ]
    assert list(blocks(judged, (1, 2, 3, 4), None, Statistics())) == []


def test_locality_on_edits_that_succeeded_leaves_out_those_that_did_nothing() -> None:
    kl = Metric("distribution", "locality_kl_nats")
    judged = {
        EFFICACY: tallies([1.0], [0.0]),
        LOCALITY: tallies([0.25], [1.0]),
        kl: tallies([3.0], [0.0]),
    }
    found = {each.metric: each for each in succeeded(judged, Statistics())}
    assert {
        metric: (each.estimate.value, each.estimate.n, each.subset)
        for metric, each in found.items()
    } == {
        LOCALITY: (0.25, 1, "succeeded"),
        kl: (3.0, 1, "succeeded"),  # it has no efficacy of its own
    }
    assert list(succeeded({EFFICACY: tallies([0.0]), LOCALITY: tallies([1.0])}, Statistics())) == []


def test_what_was_known_before_is_told_apart() -> None:
    before = {EFFICACY: tallies([1.0], [0.0], [0.0])}
    now = {EFFICACY: tallies([1.0], [1.0], [0.0])}
    found = {
        each.subset: (each.estimate.value, each.estimate.n)
        for each in known_before(now, before, Statistics())
    }
    assert found == {"known_before": (1.0, 1), "unknown_before": (0.5, 2)}
    assert list(known_before(now, {EFFICACY: tallies([0.0], [0.0], [0.0])}, Statistics())) == []


def test_forgetting_pairs_each_request_with_itself() -> None:
    then, now = (
        {EFFICACY: tallies([1.0], [1.0], [0.0], [])},
        {EFFICACY: tallies([0.0], [1.0], [0.5], [1.0])},
    )
    (found,) = forgetting(now, then, Statistics())
    assert (found.metric.name, found.estimate.value, found.estimate.n) == (
        "efficacy_forgetting",
        pytest.approx(0.5 / 3),
        3,
    )
    assert found.estimate.stderr == pytest.approx(statistics.stdev([1.0, 0.0, -0.5]) / math.sqrt(3))


@pytest.mark.parametrize("aggregation", ["request", "prompt"])
def test_forgetting_is_the_difference_of_the_two_means(aggregation: Aggregation) -> None:
    then, now = (
        {EFFICACY: tallies([1.0, 1.0, 0.0], [1.0], [])},
        {EFFICACY: tallies([0.0, 1.0, 0.0], [0.5], [])},
    )
    statistics_ = Statistics(aggregation=aggregation)
    (found,) = forgetting(now, then, statistics_)
    before, after = statistics_.estimate(then[EFFICACY]), statistics_.estimate(now[EFFICACY])
    assert (
        before is not None
        and after is not None
        and before.value is not None
        and after.value is not None
    )
    assert (
        found.estimate.value == pytest.approx(before.value - after.value)
        and found.estimate.n == after.n
    )


def test_locality_out_of_distribution_is_a_headline_where_it_is_the_only_one() -> None:
    apart = Metric("argmax", "locality_out_of_distribution")
    judged = {EFFICACY: tallies([1.0], [0.0]), apart: tallies([1.0], [0.5])}
    before = {EFFICACY: tallies([1.0], [0.0]), apart: tallies([1.0], [1.0])}
    assert [
        each.estimate.value
        for each in blocks(judged, (1, 2), 2, Statistics())
        if each.metric == apart
    ] == [0.75]
    assert [
        each.estimate.value
        for each in forgetting(judged, before, Statistics())
        if each.metric.name.startswith(apart.name)
    ] == [0.25]
    assert [
        each.estimate.value
        for each in known_before(judged, before, Statistics())
        if each.metric == apart
    ] == [1.0, 0.5]
