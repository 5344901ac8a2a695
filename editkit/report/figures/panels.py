"""Curves over seeds as values. plotly draws them for the page, matplotlib for print.

A sheet is one figure of several panels. Each panel has a line for each subject: the mean over
seeds, with its standard deviation.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from editkit.report.columns import EDITING_ORDER, TITLES
from editkit.report.compare.subjects import Measured
from editkit.report.figures.axes import MAX_COLUMNS
from editkit.report.tables import (
    TEXT,
    editing_protocols,
    edits_by_step,
    is_fraction,
    is_summarised,
)
from editkit.types import EvalRecord

WIDE = 1000  # a panel whose largest value exceeds the smallest by this factor has a log axis
MAX_POINTS = 400  # of a line, so that a page of many edits can be opened
# By metric: the title, whether the axis is logarithmic, and the number over several matrices.
WEIGHTS: Mapping[str, tuple[str, bool, Callable[[Sequence[float]], float]]] = {
    "condition_number": ("condition number", True, max),
    "sigma_max": ("largest singular value", True, max),
    "sigma_min": ("smallest singular value", True, min),
    "l1_norm": ("L1 norm", False, sum),
    "total_sigma_max": ("largest singular value of the total", True, max),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One subject. `low` and `high` are one standard deviation from the mean over seeds. With one
    seed they equal the mean.
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
    columns: int | None = None  # panels side by side; None: as many as look well


def sheets(subjects: Sequence[Measured]) -> Iterator[Sheet]:
    """Every figure for which the runs have data, in the order of the datasets."""
    datasets = list(dict.fromkeys(run_view.dataset for run_view in subjects))
    for dataset in datasets:
        of_dataset = [run_view for run_view in subjects if run_view.dataset == dataset]
        prefix = f"{dataset}_" if len(datasets) > 1 else ""
        if panels := tuple(_weight_panels(of_dataset)):
            models = len({run_view.model for run_view in of_dataset})
            yield Sheet(
                name=f"{prefix}weights",
                title=f"{dataset}: the edited matrices",
                panels=panels,
                columns=models if 1 < models <= MAX_COLUMNS else None,
            )
        protocols = dict.fromkeys(
            protocol
            for run_view in of_dataset
            for protocol in editing_protocols(run_view.run.evals)
            if protocol != TEXT
        )
        for protocol in protocols:
            if panels := tuple(_editing_panels(of_dataset, protocol)):
                name = f"{prefix}editing_{protocol}" if protocol else f"{prefix}editing"
                yield Sheet(
                    name=name,
                    title=f"{dataset}: editing" + (f", protocol {protocol}" if protocol else ""),
                    panels=panels,
                )
        if panels := tuple(_editing_panels(of_dataset, TEXT)):
            yield Sheet(name=f"{prefix}texts", title=f"{dataset}: generated texts", panels=panels)
        if panels := tuple(_routing_panels(of_dataset)):
            title = f"{dataset}: prompts that are sent beside the weights"
            yield Sheet(name=f"{prefix}routing", title=title, panels=panels)
        for suite in dict.fromkeys(
            record.measurement.suite
            for run_view in of_dataset
            for record in run_view.run.evals
            if record.measurement.kind == "downstream"
        ):
            if panels := tuple(_task_panels(of_dataset, suite)):
                yield Sheet(
                    name=f"{prefix}tasks_{suite}",
                    title=f"{dataset}: general abilities, suite {suite}",
                    panels=panels,
                )
        if panels := tuple(_language_panels(of_dataset)):
            yield Sheet(name=f"{prefix}language", title=f"{dataset}: language", panels=panels)


def label_of(run_view: Measured, subjects: Iterable[Measured]) -> str:
    """The name of a line: the parts of its label in which the subjects differ, or its restraint if
    there is one subject.
    """
    labels = {other.label for other in subjects}
    parts = [
        part
        for place, part in enumerate(run_view.label)
        if len({label[place] for label in labels}) > 1
    ]
    return ", ".join(parts) or run_view.label[2]


def _weight_panels(of_dataset: Sequence[Measured]) -> Iterator[Panel]:
    """A panel for each metric, and for each model: the weights of models have different scales. The
    lines of all models have the same names and styles.
    """
    models = list(dict.fromkeys(run_view.model for run_view in of_dataset))
    parts = [
        place for place in (1, 2) if len({run_view.label[place] for run_view in of_dataset}) > 1
    ]

    def name(run_view: Measured) -> str:
        return ", ".join(run_view.label[place] for place in parts) or run_view.label[2]

    for metric, (title, is_log, combine) in WEIGHTS.items():
        points = {
            id(run_view): weights_by_edits(run_view, metric, combine) for run_view in of_dataset
        }
        for model in models:
            of_model = [run_view for run_view in of_dataset if run_view.model == model]
            if lines := lines_of(of_model, points, name=name if len(models) > 1 else None):
                yield Panel(
                    title=f"{model}: {title}" if len(models) > 1 else title,
                    is_log=is_log or _is_wide(lines),
                    is_fraction=False,
                    lines=lines,
                )


def _is_wide(lines: Iterable[Line]) -> bool:
    """Whether a linear axis would show the smaller values as a flat line."""
    means = [mean for line in lines for mean in line.mean if math.isfinite(mean)]
    return bool(means) and min(means) > 0 and max(means) > WIDE * min(means)


def weights_by_edits(
    run_view: Measured, metric: str, combine: Callable[[Sequence[float]], float]
) -> dict[int, float]:
    """One number over all edited matrices, by number of edits. Numbers of the trajectory come from
    the steps, those of a restrained view from the milestones.
    """
    edits = edits_by_step(run_view.run.steps)
    by_edits: dict[int, list[float]] = {}
    if run_view.is_trajectory:
        for step in run_view.run.steps:
            for figures in step.modules.values():
                if metric in figures:
                    by_edits.setdefault(edits[step.step], []).append(figures[metric])
    else:
        for record in run_view.run.evals:
            if (record.view, record.measurement.kind, record.measurement.metric) == (
                run_view.view,
                "weights",
                metric,
            ):
                by_edits.setdefault(edits.get(record.step, record.step), []).append(
                    math.nan if record.measurement.value is None else record.measurement.value
                )
    if metric.startswith("total_"):
        by_edits.pop(0, None)  # the total is zero, which a log axis cannot show
    return {
        at: math.nan if any(map(math.isnan, values)) else combine(values)
        for at, values in by_edits.items()
    }


def _editing_panels(of_dataset: Sequence[Measured], protocol: str | None) -> Iterator[Panel]:
    def is_wanted(record: EvalRecord) -> bool:
        return record.measurement.kind == "editing" and record.measurement.protocol == protocol

    for task, metric in sorted(_names(of_dataset, is_wanted), key=_place):
        points = _points_of_all(of_dataset, is_wanted, metric=metric, task=task)
        title = TITLES.get(metric, metric)
        yield Panel(
            title=f"{title}, {task}" if task else title,
            is_log=False,
            is_fraction=is_fraction("editing", metric),
            lines=lines_of(of_dataset, points),
        )


def _routing_panels(of_dataset: Sequence[Measured]) -> Iterator[Panel]:
    """Recall on edited prompts and paraphrases, false alarms on locality prompts, and what texts
    cost.
    """

    def is_wanted(record: EvalRecord) -> bool:
        return record.measurement.kind == "routing"

    for task, metric in _names(of_dataset, is_wanted):
        points = _points_of_all(of_dataset, is_wanted, metric=metric, task=task)
        yield Panel(
            title=f"{metric.replace('_', ' ')}, {task}",
            is_log=False,
            is_fraction=is_fraction("routing", metric),
            lines=lines_of(of_dataset, points),
        )


def _task_panels(of_dataset: Sequence[Measured], suite: str | None) -> Iterator[Panel]:
    def is_wanted(record: EvalRecord) -> bool:
        return record.measurement.kind == "downstream" and record.measurement.suite == suite

    for task, metric in _names(of_dataset, is_wanted):
        points = _points_of_all(of_dataset, is_wanted, metric=metric, task=task)
        lines = lines_of(of_dataset, points)
        yield Panel(
            title=f"{task}: {metric.replace('_', ' ')}",
            is_log=False,
            is_fraction=_are_fractions(lines),
            lines=lines,
        )


def _language_panels(of_dataset: Sequence[Measured]) -> Iterator[Panel]:
    def is_wanted(record: EvalRecord) -> bool:
        return record.measurement.kind == "language"

    for task, metric in _names(of_dataset, is_wanted):
        points = _points_of_all(of_dataset, is_wanted, metric=metric, task=task)
        title = ", ".join(part for part in (metric.replace("_", " "), task) if part)
        yield Panel(
            title=title,
            is_log="perplexity" in metric,
            is_fraction=False,
            lines=lines_of(of_dataset, points),
        )


def _names(
    of_dataset: Sequence[Measured], is_wanted: Callable[[EvalRecord], bool]
) -> list[tuple[str, str]]:
    """The distinct pairs of task and metric of the wanted records, in their order."""
    records = (record for run_view in of_dataset for record in run_view.run.evals)
    return list(
        dict.fromkeys(
            (record.measurement.task or "", record.measurement.metric)
            for record in records
            if is_wanted(record) and is_summarised(record)
        )
    )


def _are_fractions(lines: Iterable[Line]) -> bool:
    return all(0.0 <= mean <= 1.0 for line in lines for mean in line.mean if math.isfinite(mean))


def _points_of_all(
    of_dataset: Sequence[Measured],
    is_wanted: Callable[[EvalRecord], bool],
    *,
    metric: str,
    task: str,
) -> dict[int, dict[int, float]]:
    """The points of each run view, by its id."""
    return {
        id(run_view): _points(run_view, is_wanted, metric=metric, task=task)
        for run_view in of_dataset
    }


def _points(
    run_view: Measured, is_wanted: Callable[[EvalRecord], bool], *, metric: str, task: str
) -> dict[int, float]:
    """The value by number of edits; nan if it was not finite."""
    edits = edits_by_step(run_view.run.steps)
    return {
        edits.get(record.step, record.step): math.nan
        if record.measurement.value is None
        else record.measurement.value
        for record in run_view.run.evals
        if (record.view, record.measurement.metric, record.measurement.task or "")
        == (run_view.view, metric, task)
        and is_summarised(record)
        and is_wanted(record)
    }


def lines_of(
    of_dataset: Sequence[Measured],
    points: Mapping[int, Mapping[int, float]],
    *,
    name: Callable[[Measured], str] | None = None,
) -> tuple[Line, ...]:
    """A line for each subject that has points.

    Args:
        points: values by edits, by the id of the run view.
        name: the label and the style of a line. None: by what the subjects differ.
    """
    lines = []
    for subject in dict.fromkeys(run_view.subject for run_view in of_dataset):
        seeds = [run_view for run_view in of_dataset if run_view.subject == subject]
        by_seed = [points[id(run_view)] for run_view in seeds if points.get(id(run_view))]
        if not by_seed:
            continue
        at = _thinned(sorted({edits for values in by_seed for edits in values}))
        samples = [[values[edits] for values in by_seed if edits in values] for edits in at]
        means = [
            math.nan if any(map(math.isnan, sample)) else statistics.fmean(sample)
            for sample in samples
        ]
        deviations = [
            statistics.stdev(sample) if len(sample) > 1 and not math.isnan(mean) else 0.0
            for sample, mean in zip(samples, means, strict=True)
        ]
        bands = list(zip(means, deviations, strict=True))
        lines.append(
            Line(
                label=name(seeds[0]) if name else label_of(seeds[0], of_dataset),
                subject=name(seeds[0]) if name else subject,
                is_restrained=seeds[0].is_restrained,
                at=tuple(at),
                mean=tuple(means),
                low=tuple(mean - deviation for mean, deviation in bands),
                high=tuple(mean + deviation for mean, deviation in bands),
            )
        )
    return tuple(lines)


def _thinned(at: Sequence[int]) -> list[int]:
    """At most MAX_POINTS numbers of edits, with the first and the last."""
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
