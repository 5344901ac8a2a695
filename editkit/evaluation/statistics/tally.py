"""From what was found prompt by prompt to means, their errors and confidence intervals.

A `Tally` holds one request's outcomes under one metric, in three numbers: enough for both ways of
averaging, and small enough to be kept for every edit of a run. By request (Meng et al. 2022 and
most since), a request's score is the mean over its prompts and n counts requests; by prompt, every
prompt counts the same. The prompts of one request are not independent: in both the bootstrap (Efron
1979) draws requests, and the standard error is that of requests (by prompt the cluster-robust one,
Liang and Zeger 1986, a request being a cluster).

Shape letters: R requests, S bootstrap samples, G metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from editkit.evaluation.base import harmonic_mean, mean_and_stderr
from editkit.lazy import torch

Aggregation = Literal["request", "prompt"]
SAMPLES_AT_ONCE = 2**22  # numbers


class Metric(NamedTuple):
    """What was measured; `task` is a kind of prompts ("alias", "neighbours"), None for all kinds of
    the metric together.
    """

    protocol: str
    name: str
    task: str | None = None


class Outcome(NamedTuple):
    """One prompt's contribution: in [0, 1], a difference of probabilities, or a number with a unit
    of its own.
    """

    value: float
    is_finite: bool = True


class Tally(NamedTuple):
    """One request's outcomes; none where it has no prompt for the metric."""

    total: float = 0.0
    num: float = 0.0  # of outcomes, a whole number
    nonfinite: float = 0.0  # a whole number: how many outcomes were not finite

    @property
    def mean(self) -> float:
        return self.total / self.num


Judged = Mapping[Metric, Sequence[Tally]]  # a tally for each request


def tally(outcomes: Sequence[Outcome]) -> Tally:
    """Adds up one request's outcomes."""
    values = [outcome.value for outcome in outcomes]
    nonfinite = sum(not outcome.is_finite for outcome in outcomes)
    return Tally(math.fsum(values), len(values), nonfinite)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean and how sure it is; the fields are those of a `Measurement`."""

    value: float | None
    stderr: float | None
    n: int
    nonfinite: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """How scores are averaged, and how often they are drawn anew for a confidence interval."""

    aggregation: Aggregation = "request"
    resamples: int = 0  # 0: no intervals
    confidence: float = 0.95

    def estimate(self, tallies: Iterable[Tally]) -> Estimate | None:
        """The estimate, or None if no request has a prompt."""
        judged = [each for each in tallies if each.num]
        if not judged:
            return None
        if self.aggregation == "request":
            mean, stderr = mean_and_stderr([each.mean for each in judged])
            n, nonfinite = len(judged), sum(each.nonfinite > 0 for each in judged)
        else:
            n, nonfinite = (
                round(sum(each.num for each in judged)),
                round(sum(each.nonfinite for each in judged)),
            )
            mean = math.fsum(each.total for each in judged) / n
            mean, stderr = (
                (mean, _error(self._deviations(judged, mean)))
                if math.isfinite(mean)
                else (None, None)
            )
        low, high = (
            self.interval([judged], lambda means: means[0]) if mean is not None else (None, None)
        )
        return Estimate(value=mean, stderr=stderr, n=n, nonfinite=nonfinite, low=low, high=high)

    def harmonic(self, groups: Sequence[Sequence[Tally]]) -> Estimate | None:
        """The harmonic mean of several metrics' means, over the same requests in each; None unless
        each metric was measured.

        Its standard error follows from the metrics' derivatives (delta method); there is none where
        a metric has none. `n` is the smallest of the metrics'.
        """
        found = [self.estimate(tallies) for tallies in groups]
        parts = [each for each in found if each is not None]
        means = [each.value for each in parts if each.value is not None]
        if len(means) < len(groups):
            return None
        value = harmonic_mean(means)
        stderr = None
        if value > 0 and all(each.stderr is not None for each in parts):
            # d value / d mean
            slopes = [value * value / (len(means) * mean * mean) for mean in means]
            deviations = zip(
                *(self._deviations(each, mean) for each, mean in zip(groups, means, strict=True)),
                strict=True,
            )
            asked = [
                each
                for each, of_one in zip(deviations, zip(*groups, strict=True), strict=True)
                if any(one.num for one in of_one)
            ]
            stderr = _error(
                [
                    math.fsum(slope * one for slope, one in zip(slopes, each, strict=True))
                    for each in asked
                ]
            )
        low, high = self.interval(groups, harmonic_mean) if value > 0 else (None, None)
        n, nonfinite = min(each.n for each in parts), max(each.nonfinite for each in parts)
        return Estimate(value=value, stderr=stderr, n=n, nonfinite=nonfinite, low=low, high=high)

    def interval(
        self, groups: Sequence[Sequence[Tally]], combine: Callable[[Sequence[float]], float]
    ) -> tuple[float | None, float | None]:
        """The percentile bootstrap interval of what is combined from the groups' means; the draws
        depend on the number of requests only.
        """
        num_requests = len(groups[0])
        if not self.resamples or num_requests < 2:
            return None, None
        sums_GR = torch.tensor(
            [[self._weighed(each)[0] for each in group] for group in groups], dtype=torch.float64
        )
        weights_GR = torch.tensor(
            [[self._weighed(each)[1] for each in group] for group in groups], dtype=torch.float64
        )
        generator = torch.Generator().manual_seed(num_requests)
        found: list[float] = []
        while len(found) < self.resamples:
            size = min(self.resamples - len(found), max(1, SAMPLES_AT_ONCE // num_requests))
            drawn_SR = torch.randint(num_requests, (size, num_requests), generator=generator)
            means_GS = sums_GR[:, drawn_SR].sum(-1) / weights_GR[:, drawn_SR].sum(-1)
            # a draw without a prompt is none
            found += [
                combine(means) for means in means_GS.T.tolist() if all(map(math.isfinite, means))
            ]
            if not found:
                return None, None
        tail = (1 - self.confidence) / 2
        ends = torch.tensor(found, dtype=torch.float64).quantile(
            torch.tensor([tail, 1 - tail], dtype=torch.float64)
        )
        return float(ends[0]), float(ends[1])

    def _deviations(self, tallies: Sequence[Tally], mean: float) -> list[float]:
        """What each request adds to the mean's deviation from what it estimates; they add up to
        0.
        """
        weighed = [self._weighed(each) for each in tallies]
        whole = math.fsum(weight for _, weight in weighed)
        return [(total - weight * mean) / whole for total, weight in weighed]

    def _weighed(self, each: Tally) -> tuple[float, float]:
        if self.aggregation == "prompt":
            return each.total, each.num
        return (each.mean, 1.0) if each.num else (0.0, 0.0)


def _error(deviations: Sequence[float]) -> float | None:
    """The standard error of a mean, by its requests' deviations; None for fewer than two
    requests.
    """
    num_requests = len(deviations)
    if num_requests < 2:
        return None
    return math.sqrt(
        num_requests / (num_requests - 1) * math.fsum(each * each for each in deviations)
    )


def as_rows(tallies: Sequence[Tally]) -> torch.Tensor:
    """(R, 3) float64: what a run's state can keep."""
    return torch.tensor([list(each) for each in tallies], dtype=torch.float64).reshape(-1, 3)


def from_rows(rows_R3: torch.Tensor) -> list[Tally]:
    """The inverse of `as_rows`."""
    return [Tally(*row) for row in rows_R3.tolist()]
