"""From tallies to estimates: over all requests, and over blocks and subsets of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from editkit.evaluation.protocols.base import OUT_OF_DISTRIBUTION
from editkit.evaluation.statistics.tally import Estimate, Judged, Metric, Statistics, Tally

# The last is the locality of zsRE.
HEADLINES = (
    "efficacy",
    "generalization",
    "locality",
    "portability",
    f"locality_{OUT_OF_DISTRIBUTION}",
)
SCORED = HEADLINES[:3]  # their harmonic mean is the score of `probability`
ALL_PASSED = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetEstimate:
    """An estimate of a metric over all requests, a block or a subset of them."""

    metric: Metric
    estimate: Estimate
    block: str | None = None
    subset: str | None = None


def everything(judged: Judged, statistics: Statistics) -> Iterator[SubsetEstimate]:
    """Every metric over all requests, with its kinds of prompts if it has several. The score of
    `probability` follows its parts.
    """
    yield from _estimates(_without_lone_kinds(judged), statistics)
    parts = [judged.get(Metric("probability", name)) for name in SCORED]
    if all(part is not None for part in parts):
        estimate = statistics.harmonic([part for part in parts if part is not None])
        if estimate is not None:
            yield SubsetEstimate(metric=Metric("probability", "score"), estimate=estimate)


def blocks(
    judged: Judged, positions: Sequence[int], size: int | None, statistics: Statistics
) -> Iterator[SubsetEstimate]:
    """The headlines for each block of `size` consecutive edits. The last one may be incomplete."""
    if size is None:
        return
    for number in sorted({(position - 1) // size for position in positions}):
        chosen = [row for row, position in enumerate(positions) if (position - 1) // size == number]
        label = f"{number * size + 1}-{(number + 1) * size}"
        yield from _estimates(_headlines(_part(judged, chosen)), statistics, block=label)


def succeeded(judged: Judged, statistics: Statistics) -> Iterator[SubsetEstimate]:
    """Locality on the requests whose edit succeeded: by the same protocol, or by the first protocol
    with an efficacy if it has none.
    """
    for metric, tallies in judged.items():
        if (
            metric.name.startswith("locality")
            and not metric.name.endswith("_magnitude")
            and metric.task is None
        ):
            passed = _passed(judged, metric.protocol)
            chosen = [
                tally for tally, has_passed in zip(tallies, passed, strict=True) if has_passed
            ]
            if (estimate := statistics.estimate(chosen)) is not None:
                yield SubsetEstimate(metric=metric, estimate=estimate, subset="succeeded")


def known_before(
    judged: Judged, before: Judged, statistics: Statistics
) -> Iterator[SubsetEstimate]:
    """The headlines on requests that the unedited model passed by the same protocol, and on the
    others, unless one of the two is empty.
    """
    for protocol in dict.fromkeys(metric.protocol for metric in judged):
        known = _passed(before, protocol)
        own = {metric: tallies for metric, tallies in judged.items() if metric.protocol == protocol}
        if any(known) and not all(known):
            for subset, is_known in (("known_before", True), ("unknown_before", False)):
                chosen = [row for row, was_known in enumerate(known) if was_known is is_known]
                yield from _estimates(_headlines(_part(own, chosen)), statistics, subset=subset)


def forgetting(judged: Judged, noted: Judged, statistics: Statistics) -> Iterator[SubsetEstimate]:
    """`<metric>_forgetting` of each headline: the score right after a request's own edit minus the
    current score.
    """
    for metric, tallies in _headlines(judged).items():
        losses = [
            _loss(then, now) if then.num and now.num else Tally()
            for then, now in zip(noted.get(metric, ()), tallies, strict=False)
        ]
        if (estimate := statistics.estimate(losses)) is not None:
            yield SubsetEstimate(
                metric=metric._replace(name=f"{metric.name}_forgetting"), estimate=estimate
            )


def _loss(then: Tally, now: Tally) -> Tally:
    """A request's loss, weighted by its number of prompts, which does not change. The mean is
    therefore the difference of the two means.
    """
    return Tally(then.total - now.total, now.num, max(then.nonfinite, now.nonfinite))


def _estimates(
    judged: Judged, statistics: Statistics, *, block: str | None = None, subset: str | None = None
) -> Iterator[SubsetEstimate]:
    for metric, tallies in judged.items():
        if (estimate := statistics.estimate(tallies)) is not None:
            yield SubsetEstimate(metric=metric, estimate=estimate, block=block, subset=subset)


def _part(judged: Judged, rows: Sequence[int]) -> dict[Metric, list[Tally]]:
    return {metric: [tallies[row] for row in rows] for metric, tallies in judged.items()}


def _headlines(judged: Judged) -> Mapping[Metric, Sequence[Tally]]:
    return {
        metric: tallies
        for metric, tallies in judged.items()
        if metric.name in HEADLINES and metric.task is None
    }


def _without_lone_kinds(judged: Judged) -> Judged:
    """The only kind of a metric has the metric's value, and is left out."""
    kinds: dict[tuple[str, str], set[str]] = {}
    for metric, tallies in judged.items():
        if metric.task is not None and any(tally.num for tally in tallies):
            kinds.setdefault(metric[:2], set()).add(metric.task)
    return {
        metric: tallies
        for metric, tallies in judged.items()
        if metric.task is None or len(kinds.get(metric[:2], ())) > 1
    }


def _passed(judged: Judged, protocol: str) -> list[bool]:
    """Whether each request's edit succeeded."""
    efficacies = [metric for metric in judged if metric.name == "efficacy" and metric.task is None]
    own = next((metric for metric in efficacies if metric.protocol == protocol), None) or next(
        iter(efficacies), None
    )
    if own is None:
        return [False] * len(next(iter(judged.values()), ()))
    return [tally.num > 0 and tally.mean == ALL_PASSED for tally in judged[own]]
