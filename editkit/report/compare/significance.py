"""Paired t-tests over seeds between a restrained subject and its unrestrained twin, as in PRUNE (Ma
et al. 2024, section 4).

A pair is one seed of both. From fewer than three pairs no p is given; of differences that are all
equal there is none.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from editkit.errors import ConfigError
from editkit.report.compare.summary import Mean, Summary, SummaryRow

MIN_PAIRS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One metric of one subject against its twin at one number of edits."""

    table: str  # the summary's title
    label: tuple[str, str, str]
    metric: str
    is_fraction: bool
    # restrained minus unrestrained, mean over the pairs; nan where a number was not finite
    difference: float
    n: int  # pairs of seeds
    t: float | None
    p: float | None  # two-sided, not corrected for the number of comparisons
    remark: str | None  # why there is no p


def compare(table: Summary, twins: Mapping[str, str]) -> Iterator[Comparison]:
    """Every metric of every restrained row against its twin's, where both are in the table; `twins`
    as `measured.pairs` finds them.
    """
    by_subject = {row.subject: row for row in table.rows}
    for row in table.rows:
        twin = by_subject.get(twins.get(row.subject, ""))
        if twin is None:
            continue
        for place, column in enumerate(table.columns):
            mine, other = row.cells[place], twin.cells[place]
            if mine is None or other is None or column.better is None:
                continue
            yield _comparison(
                table, row, column.title, column.is_fraction, _paired(row, mine, twin, other)
            )


def paired_t_test(differences: Sequence[float]) -> tuple[float | None, float | None, str | None]:
    """t, the two-sided p, and the reason if there is no p. Raises ConfigError without scipy."""
    if len(differences) < MIN_PAIRS:
        return None, None, "n too small"
    if not all(math.isfinite(difference) for difference in differences):
        return None, None, "not finite"
    if max(differences) - min(differences) < 1e-12:
        return None, None, "all differences equal"
    if importlib.util.find_spec("scipy") is None:
        raise ConfigError(
            "the t-tests of editkit report need scipy: pip install 'editkit[report]'."
        )
    from scipy.stats import ttest_1samp

    test = ttest_1samp(differences, 0.0)  # of paired differences: the paired test
    return float(test.statistic), float(test.pvalue), None


def _paired(row: SummaryRow, mine: Mean, twin: SummaryRow, other: Mean) -> list[float]:
    """The differences by seed. A metric that was not measured with a seed has no pair there."""
    if len(mine.values) != len(row.seeds) or len(other.values) != len(twin.seeds):
        return []
    theirs = dict(zip(twin.seeds, other.values, strict=True))
    return [
        value - theirs[seed]
        for seed, value in zip(row.seeds, mine.values, strict=True)
        if seed in theirs
    ]


def _comparison(
    table: Summary, row: SummaryRow, metric: str, is_fraction: bool, differences: Sequence[float]
) -> Comparison:
    t, p, remark = paired_t_test(differences)
    return Comparison(
        table=table.title,
        label=(row.model, row.editor, row.restraint),
        metric=metric,
        is_fraction=is_fraction,
        difference=sum(differences) / len(differences) if differences else math.nan,
        n=len(differences),
        t=t,
        p=p,
        remark=remark,
    )
