"""How each block of edits holds while others follow, side by side for several subjects and over
seeds (D4S, arXiv 2410.23843, Figure 4).
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editkit.report.compare.subjects import Measured
from editkit.report.figures.panels import label_of
from editkit.report.figures.retention import retention, retention_protocols
from editkit.report.tables import edits_by_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METRIC = "efficacy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heatmap:
    """One subject: rows are blocks of edits, columns milestones; fractions, None for edits to come
    and what was not finite.
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
    datasets = list(dict.fromkeys(each.dataset for each in subjects))
    for dataset in datasets:
        here = [each for each in subjects if each.dataset == dataset]
        for protocol in dict.fromkeys(
            protocol for each in here for protocol in retention_protocols(each.run.evals)
        ):
            maps = tuple(
                found
                for subject in dict.fromkeys(each.subject for each in here)
                if (found := _map(here, subject, protocol))
            )
            if maps:
                prefix = f"{dataset}_" if len(datasets) > 1 else ""
                title = (
                    f"{dataset}: {METRIC} of blocks of edits while others follow, protocol "
                    f"{protocol} (D4S, Figure 4)"
                )
                yield Heatmaps(name=f"{prefix}retention_{protocol}", title=title, maps=maps)


def _map(here: Sequence[Measured], subject: str, protocol: str) -> Heatmap | None:
    """The mean over the subject's seeds; only runs with the same blocks and milestones as the first
    are averaged.
    """
    runs = [each for each in here if each.subject == subject]
    found = [
        retention(
            each.run.evals,
            edits_by_step(each.run.steps),
            protocol=protocol,
            metric=METRIC,
            view=each.view,
        )
        for each in runs
    ]
    first = next((each for each in found if each is not None), None)
    if first is None:
        return None
    alike = [
        each
        for each in found
        if each is not None and (each.blocks, each.edits) == (first.blocks, first.edits)
    ]
    values = tuple(
        tuple(
            _mean([each.values[row][column] for each in alike])
            for column in range(len(first.edits))
        )
        for row in range(len(first.blocks))
    )
    return Heatmap(
        label=label_of(runs[0], here), blocks=first.blocks, edits=first.edits, values=values
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if len(known) == len(values) else None


def draw_interactive(found: Heatmaps) -> str:
    """Drawn by plotly, as a fragment for the page."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from editkit.report.figures.curves import fragment

    figure = make_subplots(
        rows=1,
        cols=len(found.maps),
        subplot_titles=["<br>".join(textwrap.wrap(each.label, 40)) for each in found.maps],
        shared_yaxes=True,
    )
    for place, each in enumerate(found.maps, start=1):
        trace: dict[str, Any] = {
            "x": [str(edits) for edits in each.edits],
            "y": list(each.blocks),
            "z": _percent(each),
            "zmin": 0,
            "zmax": 100,
        }
        trace |= {
            "colorscale": "Viridis",
            "showscale": place == len(found.maps),
            "hovertemplate": "edits %{y} after %{x}: %{z:.1f} %",
        }
        figure.add_trace(go.Heatmap(**trace, name=each.label), row=1, col=place)
        figure.update_xaxes(title_text="after edits", type="category", row=1, col=place)
    figure.update_yaxes(autorange="reversed", type="category")
    figure.update_layout(
        height=160 + 28 * max(len(each.blocks) for each in found.maps), template="plotly_white"
    )
    return fragment(figure, found.name)


def draw(found: Heatmaps) -> Figure:
    """Drawn by matplotlib, for print."""
    from matplotlib.figure import Figure

    widest, tallest = (
        max(len(each.edits) for each in found.maps),
        max(len(each.blocks) for each in found.maps),
    )
    figure = Figure(
        figsize=(len(found.maps) * (1.0 + 0.42 * widest) + 0.6, 1.1 + 0.3 * tallest),
        layout="constrained",
    )
    axes = [figure.add_subplot(1, len(found.maps), place + 1) for place in range(len(found.maps))]
    for axis, each in zip(axes, found.maps, strict=True):
        image = axis.imshow(_percent(each), vmin=0, vmax=100, cmap="viridis", aspect="auto")
        axis.set_xticks(range(len(each.edits)), [str(edits) for edits in each.edits], fontsize=7)
        axis.set_yticks(range(len(each.blocks)), each.blocks, fontsize=7)
        axis.set_xlabel("after edits", fontsize=8)
        axis.set_title(textwrap.fill(each.label, 28), fontsize=9)
    axes[0].set_ylabel("block of edits", fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.set_label(f"{METRIC}, %", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _percent(each: Heatmap) -> list[list[float]]:
    return [[math.nan if value is None else 100 * value for value in row] for row in each.values]
