"""From tallies to estimates: over all requests, and over the parts of them that are worth a number
of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from editkit.evaluation.protocols.base import OUT_OF_DISTRIBUTION
from editkit.evaluation.statistics.tally import Estimate, Judged, Metric, Statistics, Tally

# The last is another locality, and the only one of zsRE.
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
class Found:
    """An estimate, and what of."""

    metric: Metric
    estimate: Estimate
    block: str | None = None
    subset: str | None = None


def everything(judged: Judged, statistics: Statistics) -> Iterator[Found]:
    """Every metric over all requests; kinds of prompts apart where a metric has several; behind its
    parts, the score of `probability`.
    """
    yield from _estimates(_without_lone_kinds(judged), statistics)
    parts = [judged.get(Metric("probability", name)) for name in SCORED]
    if all(part is not None for part in parts):
        estimate = statistics.harmonic([part for part in parts if part is not None])
        if estimate is not None:
            yield Found(metric=Metric("probability", "score"), estimate=estimate)


def blocks(
    judged: Judged, positions: Sequence[int], size: int | None, statistics: Statistics
) -> Iterator[Found]:
    """The headlines for each block of `size` consecutive edits; one that has only begun counts with
    what there is of it.
    """
    if size is None:
        return
    for number in sorted({(position - 1) // size for position in positions}):
        chosen = [row for row, position in enumerate(positions) if (position - 1) // size == number]
        label = f"{number * size + 1}-{(number + 1) * size}"
        yield from _estimates(_headlines(_part(judged, chosen)), statistics, block=label)


def succeeded(judged: Judged, statistics: Statistics) -> Iterator[Found]:
    """Locality on the requests whose edit took: by the same protocol, or where it has no efficacy,
    by the first that has one.
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
                yield Found(metric=metric, estimate=estimate, subset="succeeded")


def known_before(judged: Judged, before: Judged, statistics: Statistics) -> Iterator[Found]:
    """The headlines on requests that the unedited model passed already by the same protocol, and on
    the others; unless either is empty.
    """
    for protocol in dict.fromkeys(metric.protocol for metric in judged):
        known = _passed(before, protocol)
        own = {metric: tallies for metric, tallies in judged.items() if metric.protocol == protocol}
        if any(known) and not all(known):
            for subset, is_known in (("known_before", True), ("unknown_before", False)):
                chosen = [row for row, was_known in enumerate(known) if was_known is is_known]
                yield from _estimates(_headlines(_part(own, chosen)), statistics, subset=subset)


def forgetting(judged: Judged, noted: Judged, statistics: Statistics) -> Iterator[Found]:
    """`<metric>_forgetting`: the score right after a request's own edit minus the score now, for
    each headline.
    """
    for metric, tallies in _headlines(judged).items():
        losses = [
            _loss(then, now) if then.num and now.num else Tally()
            for then, now in zip(noted.get(metric, ()), tallies, strict=False)
        ]
        if (estimate := statistics.estimate(losses)) is not None:
            yield Found(metric=metric._replace(name=f"{metric.name}_forgetting"), estimate=estimate)


def _loss(then: Tally, now: Tally) -> Tally:
    """A request's loss weighs as many prompts as it has, the same then and now: so the mean is the
    difference of the two means.
    """
    return Tally(then.total - now.total, now.num, max(then.nonfinite, now.nonfinite))


def _estimates(
    judged: Judged, statistics: Statistics, *, block: str | None = None, subset: str | None = None
) -> Iterator[Found]:
    for metric, tallies in judged.items():
        if (estimate := statistics.estimate(tallies)) is not None:
            yield Found(metric=metric, estimate=estimate, block=block, subset=subset)


def _part(judged: Judged, rows: Sequence[int]) -> dict[Metric, list[Tally]]:
    return {metric: [tallies[row] for row in rows] for metric, tallies in judged.items()}


def _headlines(judged: Judged) -> Mapping[Metric, Sequence[Tally]]:
    return {
        metric: tallies
        for metric, tallies in judged.items()
        if metric.name in HEADLINES and metric.task is None
    }


def _without_lone_kinds(judged: Judged) -> Judged:
    """A kind that is the only one of its metric says what the metric says."""
    kinds: dict[tuple[str, str], set[str]] = {}
    for metric, tallies in judged.items():
        if metric.task is not None and any(tally.num for tally in tallies):
            kinds.setdefault(metric[:2], set()).add(metric.task)
    return {
        metric: each
        for metric, each in judged.items()
        if metric.task is None or len(kinds.get(metric[:2], ())) > 1
    }


def _passed(judged: Judged, protocol: str) -> list[bool]:
    """Whether each request's edit took."""
    efficacies = [metric for metric in judged if metric.name == "efficacy" and metric.task is None]
    own = next((metric for metric in efficacies if metric.protocol == protocol), None) or next(
        iter(efficacies), None
    )
    if own is None:
        return [False] * len(next(iter(judged.values()), ()))
    return [tally.num > 0 and tally.mean == ALL_PASSED for tally in judged[own]]
