"""The paired t-tests of a restraint against the unrestrained twin, over seeds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from scipy import stats

from editkit.report.compare.significance import compare, paired_t_test
from editkit.report.compare.subjects import pairs
from tests.support.comparisons import subjects_in, table
from tests.support.sweeps import a_sweep, add_run, config_of, evals_of


def test_t_and_p_are_those_of_a_paired_test_over_seeds(tmp_path: Path) -> None:
    root = a_sweep(tmp_path)
    found = {
        (each.label[2], each.metric): each
        for each in compare(table(root), pairs(subjects_in(root)))
    }
    expected = stats.ttest_rel([0.7, 0.72, 0.78], [0.5, 0.51, 0.52])
    each = found["prune", "efficacy"]
    assert (each.n, each.remark) == (3, None)
    assert math.isclose(each.t or 0, expected.statistic) and math.isclose(
        each.p or 0, expected.pvalue
    )
    assert math.isclose(each.difference, (0.2 + 0.21 + 0.26) / 3)


def test_two_seeds_are_too_few_and_say_so(tmp_path: Path) -> None:
    root = a_sweep(tmp_path, seeds=2)
    for each in compare(table(root), pairs(subjects_in(root))):
        assert (each.n, each.p, each.remark) == (2, None, "n too small")


def test_only_seeds_that_both_have_are_pairs(tmp_path: Path) -> None:
    root = a_sweep(tmp_path)
    add_run(
        root,
        config_of(7, restraint={"rect": {"keep": 0.2}}),
        evals_of(efficacy={"unrestrained": 0.9}),
    )
    found = {
        each.label[2]: each
        for each in compare(table(root), pairs(subjects_in(root)))
        if each.metric == "efficacy"
    }
    assert found["rect"].n == 3
    assert math.isclose(found["rect"].difference, -0.11)


@pytest.mark.parametrize(
    ("differences", "remark"),
    [
        ([0.1, math.nan, 0.2], "not finite"),
        ([0.1, 0.1, 0.1], "all differences equal"),
        ([], "n too small"),
    ],
)
def test_there_is_no_p_where_a_test_would_mean_nothing(
    differences: list[float], remark: str
) -> None:
    assert paired_t_test(differences) == (None, None, remark)
