"""Comparison of the edited with the unedited model on the same items: the difference, its standard
error and a p-value.

The items are paired: the error is that of the differences, which is smaller than an error of two
independent samples. Scores of 0 and 1 are compared by McNemar's exact test (1947), others by the
paired bootstrap (Efron 1979). A metric that is not a mean of its items' scores, such as a
perplexity, is compared as a whole: the difference of the two aggregates, with error and p-value
from resampled items.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from editkit.records.means import mean_and_stderr

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
RESAMPLES = 10_000
ERROR_RESAMPLES = 200  # of a standard error, which needs fewer than a tail probability
AGGREGATE_RESAMPLES = 1_000  # of a metric that is not a mean, which is computed for each of them
AT_ONCE = 2**22  # numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """After minus before."""

    difference: float | None  # None: not finite
    stderr: float | None
    # two-sided: the probability of a difference at least as large if the edits had no effect
    p_value: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A task's scores of the same items."""

    before: Sequence[float]
    after: Sequence[float]
    # from scores to the task's value; None: their mean
    rule: Callable[[list[float]], float] | None = None
    weight: float = 1.0  # of the task's value among those of the other parts


def compare(before: Sequence[float], after: Sequence[float]) -> Comparison:
    """The comparison of the scores of the same items."""
    differences = [new - old for old, new in zip(before, after, strict=True)]
    difference, stderr = mean_and_stderr(differences)
    if difference is None:
        return Comparison(difference=None, stderr=None, p_value=None)
    is_binary = all(score in (0.0, 1.0) for score in (*before, *after))
    p_value = (
        mcnemar(differences.count(1.0), differences.count(-1.0))
        if is_binary
        else bootstrap(differences)
    )
    return Comparison(difference=difference, stderr=stderr, p_value=p_value)


def compare_aggregates(parts: Sequence[Part]) -> Comparison:
    """The comparison of the weighted means of the parts' values. Items are resampled part by part.
    The smallest possible p-value is 0.002.
    """
    import numpy as np

    total = math.fsum(part.weight for part in parts)
    # a rule could hide a score that is not finite: exp(-inf) is 0
    is_finite = all(math.isfinite(score) for part in parts for score in (*part.before, *part.after))
    rules = [part.rule or fmean for part in parts]
    changes = [
        part.weight * (aggregate(rule, part.after) - aggregate(rule, part.before))
        for rule, part in zip(rules, parts, strict=True)
    ]
    difference = (
        math.fsum(changes) / total if is_finite and all(map(math.isfinite, changes)) else math.nan
    )
    if not math.isfinite(difference):
        return Comparison(difference=None, stderr=None, p_value=None)
    generator = np.random.default_rng(0)  # the same items give the same p-value
    drawn = np.zeros(AGGREGATE_RESAMPLES)
    for part in parts:
        before, after = np.asarray(part.before, dtype=float), np.asarray(part.after, dtype=float)
        if part.rule is None:
            drawn += (
                part.weight / total * _drawn_means(after - before, AGGREGATE_RESAMPLES, generator)
            )
            continue
        for index in range(AGGREGATE_RESAMPLES):
            items = generator.integers(len(before), size=len(before))
            change = aggregate(part.rule, after[items].tolist()) - aggregate(
                part.rule, before[items].tolist()
            )
            drawn[index] += part.weight / total * change
    if not np.isfinite(drawn).all() or any(len(part.before) < 2 for part in parts):
        return Comparison(difference=difference, stderr=None, p_value=None)
    return Comparison(
        difference=difference, stderr=float(drawn.std(ddof=1)), p_value=_two_sided(drawn)
    )


def _drawn_means(values: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """The means of `resamples` bootstrap samples of the values."""
    import numpy as np

    rows = max(1, AT_ONCE // len(values))
    sizes = [(min(rows, resamples - start), len(values)) for start in range(0, resamples, rows)]
    return np.concatenate([generator.choice(values, size=size).mean(axis=1) for size in sizes])


def aggregate(rule: Callable[[list[T]], float], scores: Sequence[T]) -> float:
    """The rule's value of the scores; nan if it is undefined or overflows, as the perplexity of a
    broken model.
    """
    try:
        return float(rule(list(scores)))
    except (ArithmeticError, ValueError):
        return math.nan


def mcnemar(gained: int, lost: int) -> float:
    """The two-sided p-value of the exact test. Under the null hypothesis each changed item is
    equally likely to be gained or lost.
    """
    changed, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(changed, count) for count in range(fewer + 1))
    result: float = min(1.0, 2 * tail / 2**changed)
    return result


def bootstrap(differences: Sequence[float], *, resamples: int = RESAMPLES) -> float:
    """The two-sided p-value of the paired bootstrap: twice the smaller share of resampled means on
    either side of 0, never 0 itself.
    """
    if not any(differences):
        return 1.0
    import numpy as np

    generator = np.random.default_rng(0)  # the same items give the same p-value
    return _two_sided(_drawn_means(np.asarray(differences), resamples, generator))


def _two_sided(drawn: np.ndarray) -> float:
    """Twice the smaller share on either side of 0, never 0 itself."""
    below, above = int((drawn <= 0).sum()), int((drawn >= 0).sum())
    return min(1.0, 2 * (min(below, above) + 1) / (len(drawn) + 1))


def bootstrap_stderr(
    items: Sequence[T], rule: Callable[[list[T]], float], *, resamples: int = ERROR_RESAMPLES
) -> float | None:
    """The standard error of a metric that is not a mean; None for fewer than two items."""
    if len(items) < 2:
        return None
    generator = random.Random(0)
    values = [aggregate(rule, generator.choices(items, k=len(items))) for _ in range(resamples)]
    mean = math.fsum(values) / resamples
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (resamples - 1))
    return error if math.isfinite(error) else None
