"""Heat maps of retention for several subjects side by side, averaged over seeds (D4S, arXiv
2410.23843, Figure 4).
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editkit.report.compare.subjects import Measured
from editkit.report.escape import escape_label
from editkit.report.figures.panels import label_of
from editkit.report.figures.retention import retention, retention_protocols
from editkit.report.tables import edits_by_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRIC = "efficacy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """One subject. Rows are blocks of edits, columns are milestones, values are fractions. None:
    later edits, or not finite.
    """

    label: str
    blocks: tuple[str, ...]
    edits: tuple[int, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmaps:
    name: str
    title: str
    maps: tuple[Heatmap, ...]


def heatmaps(subjects: Sequence[Measured]) -> Iterator[Heatmaps]:
    """One sheet for each dataset and protocol by which blocks were measured."""
    datasets = list(dict.fromkeys(run_view.dataset for run_view in subjects))
    for dataset in datasets:
        of_dataset = [run_view for run_view in subjects if run_view.dataset == dataset]
        for protocol in dict.fromkeys(
            protocol
            for run_view in of_dataset
            for protocol in retention_protocols(run_view.run.evals)
        ):
            maps = tuple(
                heatmap
                for subject in dict.fromkeys(run_view.subject for run_view in of_dataset)
                if (heatmap := _heatmap(of_dataset, subject, protocol))
            )
            if maps:
                prefix = f"{dataset}_" if len(datasets) > 1 else ""
                title = (
                    f"{dataset}: {METRIC} of blocks of edits while others follow, protocol "
                    f"{protocol} (D4S, Figure 4)"
                )
                yield Heatmaps(name=f"{prefix}retention_{protocol}", title=title, maps=maps)


def _heatmap(of_dataset: Sequence[Measured], subject: str, protocol: str) -> Heatmap | None:
    """The mean over the seeds of a subject. Seeds whose blocks or milestones differ from
    those of the first are left out.
    """
    seeds = [run_view for run_view in of_dataset if run_view.subject == subject]
    matrices = [
        retention(
            run_view.run.evals,
            edits_by_step(run_view.run.steps),
            protocol=protocol,
            metric=METRIC,
            view=run_view.view,
        )
        for run_view in seeds
    ]
    first = next((matrix for matrix in matrices if matrix is not None), None)
    if first is None:
        return None
    averaged = [
        matrix
        for matrix in matrices
        if matrix is not None and (matrix.blocks, matrix.edits) == (first.blocks, first.edits)
    ]
    values = tuple(
        tuple(
            _mean([matrix.values[row][column] for matrix in averaged])
            for column in range(len(first.edits))
        )
        for row in range(len(first.blocks))
    )
    return Heatmap(
        label=label_of(seeds[0], of_dataset), blocks=first.blocks, edits=first.edits, values=values
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """None if a value is None."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def draw_interactive(sheet: Heatmaps) -> str:
    """Drawn by plotly, as a fragment for the page."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from editkit.report.figures.curves import fragment

    figure = make_subplots(
        rows=1,
        cols=len(sheet.maps),
        subplot_titles=[
            "<br>".join(map(escape_label, textwrap.wrap(heatmap.label, 40)))
            for heatmap in sheet.maps
        ],
        shared_yaxes=True,
    )
    for place, heatmap in enumerate(sheet.maps, start=1):
        trace: dict[str, Any] = {
            "x": [str(edits) for edits in heatmap.edits],
            "y": list(heatmap.blocks),
            "z": _percent(heatmap),
            "zmin": 0,
            "zmax": 100,
        }
        trace |= {
            "colorscale": "Viridis",
            "showscale": place == len(sheet.maps),
            "hovertemplate": "edits %{y} after %{x}: %{z:.1f} %",
        }
        figure.add_trace(go.Heatmap(**trace, name=escape_label(heatmap.label)), row=1, col=place)
        figure.update_xaxes(title_text="after edits", type="category", row=1, col=place)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(
        height=160 + 28 * max(len(heatmap.blocks) for heatmap in sheet.maps),
        template="plotly_white",
    )
    return fragment(figure, sheet.name)


def draw(sheet: Heatmaps) -> Figure:
    """Drawn by matplotlib, for print."""
    from matplotlib.figure import Figure

    widest, tallest = (
        max(len(heatmap.edits) for heatmap in sheet.maps),
        max(len(heatmap.blocks) for heatmap in sheet.maps),
    )
    figure = Figure(
        figsize=(len(sheet.maps) * (1.0 + 0.42 * widest) + 0.6, 1.1 + 0.3 * tallest),
        layout="constrained",
    )
    axes = [figure.add_subplot(1, len(sheet.maps), place + 1) for place in range(len(sheet.maps))]
    for axis, heatmap in zip(axes, sheet.maps, strict=True):
        image = axis.imshow(_percent(heatmap), vmin=0, vmax=100, cmap="viridis", aspect="auto")
        axis.set_xticks(
            range(len(heatmap.edits)), [str(edits) for edits in heatmap.edits], fontsize=7
        )
        axis.set_yticks(range(len(heatmap.blocks)), heatmap.blocks, fontsize=7)
        axis.set_xlabel("after edits", fontsize=8)
        axis.set_title(textwrap.fill(heatmap.label, 28), fontsize=9)
    axes[0].set_ylabel("block of edits", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label(f"{METRIC}, %", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _percent(heatmap: Heatmap) -> list[list[float]]:
    return [[math.nan if value is None else 100 * value for value in row] for row in heatmap.values]
