"""Curves over seeds as values: what is drawn, before anybody draws it. The page (plotly) and the
papers' figures (matplotlib) draw these.

A sheet is one figure: panels side by side, a line per subject in each, the mean over seeds
with its standard deviation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from editkit.report.compare.subjects import Measured
from editkit.report.tables import EDITING_ORDER, editing_protocols, edits_by_step, is_summarised
from editkit.types import EvalRecord

WIDE = 1000  # from the smallest to the largest: such a panel gets a logarithmic axis
MAX_POINTS = 400  # of a line: a page must open, whatever the number of edits
# Of each matrix; over several matrices the largest condition number and singular value, and the sum
# of the L1 norms.
WEIGHTS: Mapping[str, tuple[str, bool, Callable[[Sequence[float]], float]]] = {
    "condition_number": ("condition number", True, max),
    "sigma_max": ("largest singular value", True, max),
    "l1_norm": ("L1 norm", False, sum),
    "total_sigma_max": ("largest singular value of the total", True, max),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One subject. `low` and `high` are one standard deviation around the mean over seeds, equal to
    it of one seed.
    """

    label: str
    subject: str
    is_restrained: bool
    at: tuple[int, ...]  # edits
    mean: tuple[float, ...]  # nan where a seed's number was not finite
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    title: str
    is_log: bool
    is_fraction: bool  # drawn in percent
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    name: str  # a file's name
    title: str
    panels: tuple[Panel, ...]


def sheets(subjects: Sequence[Measured]) -> Iterator[Sheet]:
    """Every figure that the runs have data for, dataset by dataset."""
    datasets = list(dict.fromkeys(each.dataset for each in subjects))
    for dataset in datasets:
        here = [each for each in subjects if each.dataset == dataset]
        prefix = f"{dataset}_" if len(datasets) > 1 else ""
        if panels := tuple(_weight_panels(here)):
            yield Sheet(
                name=f"{prefix}weights", title=f"{dataset}: the edited matrices", panels=panels
            )
        for protocol in dict.fromkeys(
            protocol for each in here for protocol in editing_protocols(each.run.evals)
        ):
            if panels := tuple(_editing_panels(here, protocol)):
                name = f"{prefix}editing_{protocol}" if protocol else f"{prefix}editing"
                yield Sheet(
                    name=name,
                    title=f"{dataset}: editing" + (f", protocol {protocol}" if protocol else ""),
                    panels=panels,
                )
        for suite in dict.fromkeys(
            record.measurement.suite
            for each in here
            for record in each.run.evals
            if record.measurement.kind == "downstream"
        ):
            if panels := tuple(_task_panels(here, suite)):
                yield Sheet(
                    name=f"{prefix}tasks_{suite}",
                    title=f"{dataset}: general abilities, suite {suite}",
                    panels=panels,
                )
        if panels := tuple(_language_panels(here)):
            yield Sheet(name=f"{prefix}language", title=f"{dataset}: language", panels=panels)


def label_of(each: Measured, subjects: Iterable[Measured]) -> str:
    """What a line is called: the parts of its label in which the subjects differ; of a single one
    its restraint.
    """
    labels = {other.label for other in subjects}
    parts = [
        part for place, part in enumerate(each.label) if len({label[place] for label in labels}) > 1
    ]
    return ", ".join(parts) or each.label[2]


def _weight_panels(here: Sequence[Measured]) -> Iterator[Panel]:
    for metric, (title, is_log, together) in WEIGHTS.items():
        found = {}
        for each in here:
            if points := weights_by_edits(each, metric, together):
                found[id(each)] = points
        if lines := _lines(here, found):
            yield Panel(
                title=title, is_log=is_log or _is_wide(lines), is_fraction=False, lines=lines
            )


def _is_wide(lines: Iterable[Line]) -> bool:
    """Whether one line would press the others flat on a linear axis."""
    means = [mean for line in lines for mean in line.mean if math.isfinite(mean)]
    return bool(means) and min(means) > 0 and max(means) > WIDE * min(means)


def weights_by_edits(
    each: Measured, metric: str, together: Callable[[Sequence[float]], float]
) -> dict[int, float]:
    """Edits -> one number over all edited matrices. The trajectory's come from the steps, a
    restrained view's from the milestones.
    """
    edits = edits_by_step(each.run.steps)
    by_edits: dict[int, list[float]] = {}
    if each.is_trajectory:
        for step in each.run.steps:
            for figures in step.modules.values():
                if metric in figures:
                    by_edits.setdefault(edits[step.step], []).append(figures[metric])
    else:
        for record in each.run.evals:
            if (record.view, record.measurement.kind, record.measurement.metric) == (
                each.view,
                "weights",
                metric,
            ):
                by_edits.setdefault(edits.get(record.step, record.step), []).append(
                    math.nan if record.measurement.value is None else record.measurement.value
                )
    if metric.startswith("total_"):
        by_edits.pop(0, None)  # nothing was added yet, which a log axis cannot show
    return {
        at: math.nan if any(map(math.isnan, values)) else together(values)
        for at, values in by_edits.items()
    }


def _editing_panels(here: Sequence[Measured], protocol: str | None) -> Iterator[Panel]:
    def is_wanted(record: EvalRecord) -> bool:
        return record.measurement.kind == "editing" and record.measurement.protocol == protocol

    for task, metric in sorted(_names(here, is_wanted), key=_place):
        found = {id(each): _points(each, is_wanted, metric=metric, task=task) for each in here}
        yield Panel(
            title=f"{metric}, {task}" if task else metric,
            is_log=False,
            is_fraction=True,
            lines=_lines(here, found),
        )


def _task_panels(here: Sequence[Measured], suite: str | None) -> Iterator[Panel]:
    def is_wanted(record: EvalRecord) -> bool:
        return record.measurement.kind == "downstream" and record.measurement.suite == suite

    for task, metric in _names(here, is_wanted):
        found = {id(each): _points(each, is_wanted, metric=metric, task=task) for each in here}
        lines = _lines(here, found)
        yield Panel(
            title=f"{task}: {metric.replace('_', ' ')}",
            is_log=False,
            is_fraction=_are_fractions(lines),
            lines=lines,
        )


def _language_panels(here: Sequence[Measured]) -> Iterator[Panel]:
    def is_wanted(record: EvalRecord) -> bool:
        return record.measurement.kind == "language"

    for task, metric in _names(here, is_wanted):
        found = {id(each): _points(each, is_wanted, metric=metric, task=task) for each in here}
        title = ", ".join(part for part in (metric.replace("_", " "), task) if part)
        yield Panel(
            title=title, is_log="perplexity" in metric, is_fraction=False, lines=_lines(here, found)
        )


def _names(
    here: Sequence[Measured], is_wanted: Callable[[EvalRecord], bool]
) -> list[tuple[str, str]]:
    """Task and metric of every wanted number, each once, in the order of the records."""
    found = (record for each in here for record in each.run.evals)
    return list(
        dict.fromkeys(
            (record.measurement.task or "", record.measurement.metric)
            for record in found
            if is_wanted(record) and is_summarised(record)
        )
    )


def _are_fractions(lines: Iterable[Line]) -> bool:
    return all(0.0 <= mean <= 1.0 for line in lines for mean in line.mean if math.isfinite(mean))


def _points(
    each: Measured, is_wanted: Callable[[EvalRecord], bool], *, metric: str, task: str
) -> dict[int, float]:
    edits = edits_by_step(each.run.steps)
    return {
        edits.get(record.step, record.step): math.nan
        if record.measurement.value is None
        else record.measurement.value
        for record in each.run.evals
        if (record.view, record.measurement.metric, record.measurement.task or "")
        == (each.view, metric, task)
        and is_summarised(record)
        and is_wanted(record)
    }


def _lines(here: Sequence[Measured], found: Mapping[int, Mapping[int, float]]) -> tuple[Line, ...]:
    lines = []
    for subject in dict.fromkeys(each.subject for each in here):
        runs = [each for each in here if each.subject == subject]
        points = [found[id(each)] for each in runs if found.get(id(each))]
        if not points:
            continue
        at = _thinned(sorted({edits for each in points for edits in each}))
        values = [[each[edits] for each in points if edits in each] for edits in at]
        means = [
            math.nan if any(map(math.isnan, each)) else statistics.fmean(each) for each in values
        ]
        deviations = [
            statistics.stdev(each) if len(each) > 1 and not math.isnan(mean) else 0.0
            for each, mean in zip(values, means, strict=True)
        ]
        lines.append(
            Line(
                label=label_of(runs[0], here),
                subject=subject,
                is_restrained=runs[0].is_restrained,
                at=tuple(at),
                mean=tuple(means),
                low=tuple(
                    mean - deviation for mean, deviation in zip(means, deviations, strict=True)
                ),
                high=tuple(
                    mean + deviation for mean, deviation in zip(means, deviations, strict=True)
                ),
            )
        )
    return tuple(lines)


def _thinned(at: Sequence[int]) -> list[int]:
    """At most MAX_POINTS of them, the first and the last among them."""
    if len(at) <= MAX_POINTS:
        return list(at)
    places = {round(place * (len(at) - 1) / (MAX_POINTS - 1)) for place in range(MAX_POINTS)}
    return [at[place] for place in sorted(places)]


def _place(name: tuple[str, str]) -> tuple[int, str, str]:
    task, metric = name
    return (
        EDITING_ORDER.index(metric) if metric in EDITING_ORDER else len(EDITING_ORDER),
        metric,
        task,
    )
