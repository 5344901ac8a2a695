"""From the outcomes of prompts to means, standard errors and confidence intervals.

A `Tally` sums one request's outcomes under one metric in three numbers. They suffice for both ways
of averaging, and are small enough to be kept for every edit of a run.

By request (Meng et al. 2022 and most since), a request's score is the mean over its prompts, and n
counts requests. By prompt, every prompt counts the same. The prompts of one request are not
independent: in both cases the bootstrap (Efron 1979) draws requests. The standard error is that
over requests; by prompt it is cluster-robust (Liang and Zeger 1986) with a cluster per request.

Shape letters: R requests, S bootstrap samples, G metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from editkit.lazy import torch
from editkit.records.means import harmonic_mean, mean_and_stderr

Aggregation = Literal["request", "prompt"]
SAMPLES_AT_ONCE = 2**22  # numbers


class Metric(NamedTuple):
    """A metric of a protocol. `task` is a kind of prompts ("alias", "neighbours"); None: all kinds
    of the metric together.
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
    """The sum of one request's outcomes; empty if it has no prompt for the metric."""

    total: float = 0.0
    num: float = 0.0  # number of outcomes
    nonfinite: float = 0.0  # number of outcomes that are not finite

    @property
    def mean(self) -> float:
        return self.total / self.num


Judged = Mapping[Metric, Sequence[Tally]]  # a tally for each request


def tally(outcomes: Sequence[Outcome]) -> Tally:
    """The sum of one request's outcomes."""
    values = [outcome.value for outcome in outcomes]
    nonfinite = sum(not outcome.is_finite for outcome in outcomes)
    return Tally(math.fsum(values), len(values), nonfinite)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its uncertainty. The fields are those of a `Measurement`."""

    value: float | None
    stderr: float | None
    n: int
    nonfinite: int
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """The averaging of scores, and the number of bootstrap resamples."""

    aggregation: Aggregation = "request"
    resamples: int = 0  # 0: no intervals
    confidence: float = 0.95

    def estimate(self, tallies: Iterable[Tally]) -> Estimate | None:
        """The estimate, or None if no request has a prompt."""
        judged = [request for request in tallies if request.num]
        if not judged:
            return None
        if self.aggregation == "request":
            mean, stderr = mean_and_stderr([request.mean for request in judged])
            n, nonfinite = len(judged), sum(request.nonfinite > 0 for request in judged)
        else:
            n = round(sum(request.num for request in judged))
            nonfinite = round(sum(request.nonfinite for request in judged))
            mean, stderr = math.fsum(request.total for request in judged) / n, None
            if math.isfinite(mean):
                stderr = _error(self._deviations(judged, mean))
            else:
                mean = None
        low, high = None, None
        if mean is not None:
            low, high = self.interval([judged], lambda means: means[0])
        return Estimate(value=mean, stderr=stderr, n=n, nonfinite=nonfinite, low=low, high=high)

    def harmonic(self, groups: Sequence[Sequence[Tally]]) -> Estimate | None:
        """The harmonic mean of several metrics' means over the same requests; None unless every
        metric was measured.

        Its standard error follows by the delta method, and is None if that of a metric is. `n` is
        the smallest of the metrics'.
        """
        estimates = [self.estimate(tallies) for tallies in groups]
        parts = [estimate for estimate in estimates if estimate is not None]
        means = [part.value for part in parts if part.value is not None]
        if len(means) < len(groups):
            return None
        value = harmonic_mean(means)
        stderr = None
        if value > 0 and all(part.stderr is not None for part in parts):
            # d value / d mean
            slopes = [value * value / (len(means) * mean * mean) for mean in means]
            by_metric = [
                self._deviations(group, mean) for group, mean in zip(groups, means, strict=True)
            ]
            requests = zip(zip(*by_metric, strict=True), zip(*groups, strict=True), strict=True)
            stderr = _error(
                [
                    math.fsum(map(math.prod, zip(slopes, deviations, strict=True)))
                    for deviations, tallies in requests
                    if any(tally.num for tally in tallies)
                ]
            )
        low, high = self.interval(groups, harmonic_mean) if value > 0 else (None, None)
        n, nonfinite = min(part.n for part in parts), max(part.nonfinite for part in parts)
        return Estimate(value=value, stderr=stderr, n=n, nonfinite=nonfinite, low=low, high=high)

    def interval(
        self, groups: Sequence[Sequence[Tally]], combine: Callable[[Sequence[float]], float]
    ) -> tuple[float | None, float | None]:
        """The percentile bootstrap interval of a combination of the groups' means. The draws depend
        on the number of requests alone.
        """
        num_requests = len(groups[0])
        if not self.resamples or num_requests < 2:
            return None, None
        sums_GR = torch.tensor(
            [[self._weighted(one)[0] for one in group] for group in groups], dtype=torch.float64
        )
        weights_GR = torch.tensor(
            [[self._weighted(one)[1] for one in group] for group in groups], dtype=torch.float64
        )
        generator = torch.Generator().manual_seed(num_requests)
        values: list[float] = []
        while len(values) < self.resamples:
            size = min(self.resamples - len(values), max(1, SAMPLES_AT_ONCE // num_requests))
            drawn_SR = torch.randint(num_requests, (size, num_requests), generator=generator)
            means_GS = sums_GR[:, drawn_SR].sum(-1) / weights_GR[:, drawn_SR].sum(-1)
            # A draw without a prompt is repeated.
            values += [
                combine(means) for means in means_GS.T.tolist() if all(map(math.isfinite, means))
            ]
            if not values:
                return None, None
        tail = (1 - self.confidence) / 2
        ends = torch.tensor(values, dtype=torch.float64).quantile(
            torch.tensor([tail, 1 - tail], dtype=torch.float64)
        )
        return float(ends[0]), float(ends[1])

    def _deviations(self, tallies: Sequence[Tally], mean: float) -> list[float]:
        """Each request's contribution to the mean's deviation from its expectation. They sum to
        0.
        """
        weighted = [self._weighted(request) for request in tallies]
        weights = math.fsum(weight for _, weight in weighted)
        return [(total - weight * mean) / weights for total, weight in weighted]

    def _weighted(self, request: Tally) -> tuple[float, float]:
        if self.aggregation == "prompt":
            return request.total, request.num
        return (request.mean, 1.0) if request.num else (0.0, 0.0)


def _error(deviations: Sequence[float]) -> float | None:
    """The standard error of a mean from its requests' deviations; None for fewer than two."""
    num_requests = len(deviations)
    if num_requests < 2:
        return None
    return math.sqrt(
        num_requests
        / (num_requests - 1)
        * math.fsum(deviation * deviation for deviation in deviations)
    )


def as_rows(tallies: Sequence[Tally]) -> torch.Tensor:
    """(R, 3) float64, for a run's state, which holds tensors only."""
    return torch.tensor([list(request) for request in tallies], dtype=torch.float64).reshape(-1, 3)


def from_rows(rows_R3: torch.Tensor) -> list[Tally]:
    """The inverse of `as_rows`."""
    return [Tally(*row) for row in rows_R3.tolist()]
