"""Means of scores: what evaluations record, whoever measured the scores."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_and_stderr(scores: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean and its standard error. Both are None if the mean is not finite, the error also for
    fewer than two scores.
    """
    n = len(scores)
    mean = math.fsum(scores) / n if all(map(math.isfinite, scores)) else math.nan
    if not math.isfinite(mean):
        return None, None
    if n < 2:
        return mean, None
    variance = math.fsum((score - mean) ** 2 for score in scores) / (n - 1)
    return mean, math.sqrt(variance / n)


def harmonic_mean(values: Sequence[float]) -> float:
    """n / sum(1 / value); 0 as soon as one value is 0."""
    return (
        len(values) / math.fsum(1 / value for value in values)
        if all(value > 0 for value in values)
        else 0.0
    )
