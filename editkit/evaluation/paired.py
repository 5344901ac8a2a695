"""The edited model against the unedited one on the same items: a difference, its standard error and how surprising it is.

The items are paired, so the error is that of the differences, which is smaller than what the two errors would make. Scores of 0 and 1 are
compared by McNemar's exact test (1947), others by the paired bootstrap (Efron 1979).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from editkit.evaluation.base import mean_and_stderr

T = TypeVar("T")
RESAMPLES = 10_000
ERROR_RESAMPLES = 200  # for a standard error, which needs fewer than a tail

AT_ONCE = 2**22  # numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """After minus before."""

    difference: float | None  # None: not finite
    stderr: float | None
    p_value: float | None  # two-sided: how probable as large a difference is if the edits had no effect


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """Of the scores of the same items."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    difference, stderr = mean_and_stderr(differences)
    if difference is None:
        return Comparison(difference=None, stderr=None, p_value=None)
    is_binary = all(score in (0.0, 1.0) for score in (*before, *after))
    p_value = mcnemar(differences.count(1.0), differences.count(-1.0)) if is_binary else bootstrap(differences)
    return Comparison(difference=difference, stderr=stderr, p_value=p_value)


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p of the exact test: under the null hypothesis each changed item was as likely to be gained as to be lost."""
    changed, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(changed, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**changed)


def bootstrap(differences: Sequence[float], *, resamples: int = RESAMPLES) -> float:
    """The two-sided p of the paired bootstrap: twice the smaller share of resampled means on either side of 0, never 0 itself."""
    if not any(differences):
        return 1.0
    import numpy as np

    generator = np.random.default_rng(0)  # the same items give the same p
    values = np.asarray(differences)
    rows = max(1, AT_ONCE // len(values))
    below = above = 0
    for start in range(0, resamples, rows):
        sums = generator.choice(values, size=(min(rows, resamples - start), len(values))).sum(axis=1)
        below, above = below + int((sums <= 0).sum()), above + int((sums >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (resamples + 1))


def bootstrap_stderr(items: Sequence[T], aggregate: Callable[[list[T]], float], *, resamples: int = ERROR_RESAMPLES) -> float | None:
    """The standard error of a metric that is no mean; None for fewer than two items."""
    if len(items) < 2:
        return None
    generator = random.Random(0)
    values = [aggregate(generator.choices(items, k=len(items))) for _ in range(resamples)]
    mean = math.fsum(values) / resamples
    found = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (resamples - 1))
    return found if math.isfinite(found) else None
