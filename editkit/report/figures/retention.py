"""Retention of each block of edits after later edits, as values and as heat maps (D4S, arXiv
2410.23843, Figures 4 and 8).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.report.figures.axes import LEGEND_LINE
from editkit.types import EvalRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

METRICS = ("efficacy", "generalization", "locality", "portability", "locality_out_of_distribution")
CELL = (0.52, 0.32)  # inches


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """One metric of one view. Rows are blocks of edits, columns are milestones. None: later edits,
    or not finite.
    """

    protocol: str
    metric: str
    view: str
    blocks: tuple[str, ...]  # "1-50"
    edits: tuple[int, ...]  # of the milestones; 0: the unedited model
    values: tuple[tuple[float | None, ...], ...]  # fractions, a row for each block


def retention_protocols(evals: Iterable[EvalRecord]) -> tuple[str, ...]:
    """The protocols by which blocks of edits were measured."""
    return tuple(
        dict.fromkeys(
            record.measurement.protocol
            for record in evals
            if _is_retention(record) and record.measurement.protocol
        )
    )


def retention(
    evals: Sequence[EvalRecord], edits: Mapping[int, int], *, protocol: str, metric: str, view: str
) -> Retention | None:
    """The matrix of one metric. None if blocks were not measured.

    Args:
        edits: the number of edits at each measured step (`tables.edits_by_step`).
    """
    records = [
        record
        for record in evals
        if _is_retention(record)
        and (record.measurement.protocol, record.measurement.metric, record.view)
        == (protocol, metric, view)
    ]
    if not records:
        return None
    blocks = sorted({str(record.measurement.block) for record in records}, key=_first)
    steps = sorted({record.step for record in records})
    values = {
        (str(record.measurement.block), record.step): record.measurement.value for record in records
    }
    return Retention(
        protocol=protocol,
        metric=metric,
        view=view,
        blocks=tuple(blocks),
        edits=tuple(edits.get(step, step) for step in steps),
        values=tuple(tuple(values.get((block, step)) for step in steps) for block in blocks),
    )


def draw_retention(
    evals: Sequence[EvalRecord], edits: Mapping[int, int], protocol: str
) -> Figure | None:
    """A row of panels for each metric, a column for each view. Bright cells are high values."""
    from matplotlib.figure import Figure

    views = list(
        dict.fromkeys(
            record.view
            for record in evals
            if _is_retention(record) and record.measurement.protocol == protocol
        )
    )
    maps = [
        [retention(evals, edits, protocol=protocol, metric=metric, view=view) for view in views]
        for metric in METRICS
    ]
    maps = [row for row in maps if any(row)]
    if not maps:
        return None
    first = next(matrix for row in maps for matrix in row if matrix is not None)
    width = max(2.6, CELL[0] * len(first.edits) + 1.3) * len(views)
    height = (max(1.2, CELL[1] * len(first.blocks)) + 0.9) * len(maps)
    figure = Figure(figsize=(width + 0.6, height + LEGEND_LINE), layout="constrained")
    axes: list[Axes] = []
    image: AxesImage | None = None
    for row, of_metric in enumerate(maps):
        for column, matrix in enumerate(of_metric):
            if matrix is not None:
                axes.append(
                    figure.add_subplot(len(maps), len(views), row * len(views) + column + 1)
                )
                image = _draw(
                    axes[-1],
                    matrix,
                    title=f"{matrix.metric}, {matrix.view}" if len(views) > 1 else matrix.metric,
                )
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=30)
    bar.set_label(f"{protocol} protocol, %", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def _draw(axis: Axes, matrix: Retention, *, title: str) -> AxesImage:
    values = [
        [math.nan if value is None else 100 * value for value in row] for row in matrix.values
    ]
    image = axis.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for row, of_block in enumerate(values):
        for column, value in enumerate(of_block):
            if math.isfinite(value):
                axis.text(
                    column,
                    row,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if value < 60 else "black",
                )
    axis.set_xticks(range(len(matrix.edits)), [str(edits) for edits in matrix.edits], fontsize=8)
    axis.set_yticks(range(len(matrix.blocks)), matrix.blocks, fontsize=8)
    axis.set_xlabel("after edits", fontsize=9)
    axis.set_ylabel("block of edits", fontsize=9)
    axis.set_title(title, fontsize=10)
    return image


def _is_retention(record: EvalRecord) -> bool:
    return (
        record.measurement.block is not None
        and record.measurement.kind == "editing"
        and record.measurement.timing in ("before", "milestone")
        and record.measurement.task is None
    )


def _first(block: str) -> int:
    return int(block.partition("-")[0])
