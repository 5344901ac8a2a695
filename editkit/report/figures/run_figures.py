"""The figures of a run: weights, metrics and tasks by number of edits, like Figures 2 to 4 of PRUNE
(Ma et al. 2024, arXiv 2405.16821).

Lines of restrained views are solid, those of the unrestrained model dashed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from editkit.files import file_name, write_atomically
from editkit.records.reader import RunRecords, load_run
from editkit.records.views import UNRESTRAINED
from editkit.report.columns import EDITING_ORDER, TITLES
from editkit.report.escape import without_markup
from editkit.report.figures.axes import (
    colours,
    dress,
    grid,
    legend,
    mark_lost,
    num_columns,
    view_style,
)
from editkit.report.figures.retention import draw_retention, retention_protocols
from editkit.report.tables import (
    TEXT,
    editing_protocols,
    edits_by_step,
    is_fraction,
    is_summarised,
)
from editkit.types import EvalRecord, StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 200
SPECTRUM = {
    "condition_number": r"condition number, $\sigma_{\max} / \sigma_{\min}$",
    "sigma_max": r"largest singular value, $\sigma_{\max}$",
    "sigma_min": r"smallest singular value, $\sigma_{\min}$",
}
L1_NORM = {"l1_norm": r"L1 norm, $\Sigma_{ij}\, |w_{ij}|$"}
FORMULAS = {*SPECTRUM.values(), *L1_NORM.values()}


def draw_figures(folder: Path) -> tuple[Path, ...]:
    """Draws the measurements of a run into `<folder>/figures/*.png` and returns the files. There is
    no figure without data.

    Raises ConfigError for a folder that holds no run, or malformed files.
    """
    run = load_run(folder)
    figures = {
        "spectrum": draw_spectrum(run),
        "l1_norm": draw_l1_norm(run),
        "tasks": draw_tasks(run),
        "routing": draw_routing(run),
        "texts": draw_editing(run, TEXT),
    }
    figures |= {
        f"editing_{protocol}" if protocol else "editing": draw_editing(run, protocol)
        for protocol in editing_protocols(run.evals)
        if protocol != TEXT
    }
    files: list[Path] = []
    figures |= {
        f"retention_{protocol}": draw_retention(run.evals, edits_by_step(run.steps), protocol)
        for protocol in retention_protocols(run.evals)
    }
    for name, figure in figures.items():
        if figure is not None:
            buffer = io.BytesIO()
            # without metadata, the same records give the same bytes
            without_markup(figure, formulas=FORMULAS)
            figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
            files.append(folder / "figures" / f"{file_name(name)}.png")
            write_atomically(files[-1], buffer.getvalue())
    return tuple(files)


def draw_spectrum(run: RunRecords) -> Figure | None:
    """Condition number, sigma_max and sigma_min of every edited matrix, on log axes."""
    return _draw_weights(run, SPECTRUM, scale="log")


def draw_l1_norm(run: RunRecords) -> Figure | None:
    """The L1 norm of every edited matrix."""
    return _draw_weights(run, L1_NORM, scale="linear")


def draw_editing(run: RunRecords, protocol: str | None) -> Figure | None:
    """The editing metrics of one protocol, a panel for each metric."""
    order = {metric: place for place, metric in enumerate(EDITING_ORDER)}
    records = [
        record
        for record in run.evals
        if record.measurement.kind == "editing"
        and record.measurement.protocol == protocol
        and is_summarised(record)
    ]
    panels: dict[str, list[EvalRecord]] = {}
    for record in sorted(
        records, key=lambda record: order.get(record.measurement.metric, len(order))
    ):
        metric, task = record.measurement.metric, record.measurement.task
        title = TITLES.get(metric, metric)
        panels.setdefault(f"{title}, {task}" if task else title, []).append(record)
    name = "" if protocol == TEXT else f"{protocol} protocol, " if protocol else ""
    return _draw_panels(run, panels, ylabel=f"{name}%")


def draw_tasks(run: RunRecords) -> Figure | None:
    """The downstream tasks, a panel for each task."""
    records = [
        record
        for record in run.evals
        if record.measurement.kind == "downstream" and is_summarised(record)
    ]
    has_suites = len({record.measurement.suite for record in records}) > 1
    panels: dict[str, list[EvalRecord]] = {}
    for record in records:
        name = (
            f"{record.measurement.suite}/{record.measurement.task}"
            if has_suites
            else str(record.measurement.task)
        )
        panels.setdefault(f"{name}: {record.measurement.metric.replace('_', ' ')}", []).append(
            record
        )
    return _draw_panels(run, panels, ylabel="score, %")


def draw_routing(run: RunRecords) -> Figure | None:
    """Which prompts are sent beside the weights, a panel for each kind of prompt."""
    panels: dict[str, list[EvalRecord]] = {}
    for record in run.evals:
        if record.measurement.kind == "routing" and is_summarised(record):
            metric = record.measurement.metric.replace("_", " ")
            panels.setdefault(f"{metric}, {record.measurement.task}", []).append(record)
    return _draw_panels(run, panels, ylabel="prompts, %")


def _draw_weights(run: RunRecords, titles: Mapping[str, str], *, scale: str) -> Figure | None:
    """A panel for each quantity, a colour for each matrix. Restrained views whose weights were
    measured have a mark at every milestone.
    """
    modules = list(dict.fromkeys(module for step in run.steps for module in step.modules))
    if not modules:
        return None
    edits = edits_by_step(run.steps)
    # the runner measures the trajectory's view first
    trajectory = run.evals[0].view if run.evals else UNRESTRAINED
    weights = [
        record
        for record in run.evals
        if record.measurement.kind == "weights" and record.view != trajectory
    ]
    views = list(dict.fromkeys([trajectory, *(record.view for record in weights)]))
    figure, axes = grid(len(titles), width=3.4 if len(titles) > 1 else 5.0, height=2.9)
    for axis, (metric, title) in zip(axes, titles.items(), strict=True):
        axis.set_yscale(scale)
        for module, colour in zip(modules, colours(len(modules)), strict=True):
            for view in views:
                if view == trajectory:
                    steps = [step for step in run.steps if metric in step.modules.get(module, {})]
                    at, values = (
                        [edits[step.step] for step in steps],
                        [step.modules[module][metric] for step in steps],
                    )
                else:
                    records = [
                        record
                        for record in weights
                        if (record.view, record.measurement.metric, record.measurement.task)
                        == (view, metric, module)
                    ]
                    at, values = (
                        [edits.get(record.step, record.step) for record in records],
                        [_number(record.measurement.value) for record in records],
                    )
                style = view_style(view, views) | {"linewidth": 1.3, "markersize": 3.5}
                if len(views) == 1:
                    style["linestyle"] = "-"  # dashes only distinguish views
                if len(views) == 1 or len(modules) > 1:
                    style["color"] = colour
                if view == trajectory and len(at) > 1:
                    style["marker"] = ""  # the trajectory has too many points for marks
                name = f"{module}, {view}" if len(views) > 1 else module
                axis.plot(
                    at,
                    values,
                    gid=name,
                    label="" if len(modules) > 1 < len(views) else name,
                    **style,
                )
        # The legend explains the matrices by colour and the views by style, not each pair of both.
        if len(modules) > 1 < len(views):
            for module, colour in zip(modules, colours(len(modules)), strict=True):
                axis.plot([], [], color=colour, label=module)
            for view in views:
                axis.plot(
                    [],
                    [],
                    label=view,
                    **view_style(view, views)
                    | {"color": "0.3", "linewidth": 1.3, "markersize": 3.5},
                )
        lost = [_is_lost(step, metric) for step in run.steps]
        first_lost = [
            edits[step.step]
            for step, now, before in zip(run.steps, lost, [False, *lost], strict=False)
            if now and not before
        ]
        mark_lost(axis, first_lost)
        dress(axis, title="", ylabel=title)
    legend(figure, axes)
    return figure


def _draw_panels(
    run: RunRecords, panels: Mapping[str, Sequence[EvalRecord]], *, ylabel: str
) -> Figure | None:
    """A panel for each metric, a line for each view. Fractions are in percent."""
    if not panels:
        return None
    edits = edits_by_step(run.steps)
    views = list(dict.fromkeys(record.view for records in panels.values() for record in records))
    figure, axes = grid(len(panels), width=2.6, height=2.5)
    for place, (axis, (title, records)) in enumerate(zip(axes, panels.items(), strict=True)):
        first = records[0].measurement
        in_percent = is_fraction(first.kind, first.metric)
        for view in views:
            of_view = [record for record in records if record.view == view]
            _draw_view(axis, of_view, edits, views, scale=100 if in_percent else 1)
        if in_percent:
            axis.set_ylim(-4, 104)
        is_left = place % num_columns(len(panels)) == 0
        dress(axis, title=title, ylabel=ylabel if is_left and in_percent else "")
    has_errors = any(
        record.measurement.stderr is not None for records in panels.values() for record in records
    )
    legend(figure, axes, note="bars: ± one standard error" if has_errors else None)
    return figure


def _draw_view(
    axis: Axes,
    records: Sequence[EvalRecord],
    edits: Mapping[int, int],
    views: Sequence[str],
    *,
    scale: float,
) -> None:
    if not records:
        return
    at = [edits.get(record.step, record.step) for record in records]
    values = [scale * _number(record.measurement.value) for record in records]
    errors = [scale * (record.measurement.stderr or 0.0) for record in records]
    style = view_style(records[0].view, views)
    axis.errorbar(
        at,
        values,
        yerr=errors,
        label=records[0].view,
        linewidth=1.3,
        markersize=3.5,
        elinewidth=0.8,
        capsize=2,
        **style,
    )
    mark_lost(
        axis,
        [
            edits.get(record.step, record.step)
            for record in records
            if record.measurement.value is None
        ],
        color=style["color"],
    )


def _is_lost(step: StepRecord, metric: str) -> bool:
    return step.nonfinite is not None or not all(
        math.isfinite(figures.get(metric, 0.0)) for figures in step.modules.values()
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
