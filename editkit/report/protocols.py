"""The protocols compared on one edited model: a row for each metric, a column for each protocol.

The comparison covers one view at one step. Protocols never share a column. The timing of a number
is all edits so far, or right after each edit where that was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from editkit.errors import ConfigError
from editkit.report.columns import EDITING_ORDER
from editkit.report.tables import ALL_EDITS_SO_FAR, UNITS, Cell, number
from editkit.types import EvalRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The last milestone of one view. Rows are named by metric, kind of prompts, subset and
    timing.
    """

    view: str
    edits: int
    protocols: tuple[str, ...]
    rows: tuple[str, ...]
    cells: tuple[tuple[Cell | None, ...], ...]  # by row, then by protocol
    has_units: tuple[bool, ...]  # by row: whether the numbers have a unit and are no fractions


def compare_protocols(
    evals: Sequence[EvalRecord], edits: Mapping[int, int], *, view: str | None = None
) -> Comparison | None:
    """The comparison at the last step at which edits were measured. None if there is no such step.

    Args:
        view: None is the view of the trajectory.

    Raises ConfigError if a cell would hold two numbers.
    """
    editing = [
        record
        for record in evals
        if record.measurement.kind == "editing"
        and record.measurement.block is None
        and record.measurement.timing != "final"
    ]
    view = view if view is not None or not editing else editing[0].view
    editing = [record for record in editing if record.view == view]
    if view is None or not editing:
        return None
    step = max(record.step for record in editing)
    at_step = [record for record in editing if record.step == step]
    protocols = tuple(dict.fromkeys(record.measurement.protocol or "" for record in at_step))
    cells: dict[tuple[str, str], Cell] = {}
    for record in at_step:
        place = (_name(record), record.measurement.protocol or "")
        if place in cells:
            raise ConfigError(
                f"'{place[0]}' was measured twice by the protocol '{place[1]}' for view '{view}' "
                f"at step {step}."
            )
        cells[place] = Cell(
            value=record.measurement.value, stderr=record.measurement.stderr, n=record.measurement.n
        )
    rows = tuple(dict.fromkeys(_name(record) for record in sorted(at_step, key=_place)))
    units = {_name(record): record.measurement.metric.endswith(UNITS) for record in at_step}
    return Comparison(
        view=view,
        edits=edits.get(step, step),
        protocols=protocols,
        rows=rows,
        cells=tuple(tuple(cells.get((row, protocol)) for protocol in protocols) for row in rows),
        has_units=tuple(units[row] for row in rows),
    )


def texts(comparison: Comparison, *, stderr: bool = False) -> list[list[str]]:
    """The numbers as text: fractions in percent, with their standard errors if asked for."""
    rows = zip(comparison.cells, comparison.has_units, strict=True)
    return [
        [_text(cell, has_unit=has_unit, stderr=stderr) for cell in cells]
        for cells, has_unit in rows
    ]


def markdown(comparison: Comparison) -> str:
    """A GitHub table."""
    lines = [
        [f"after {comparison.edits} edits, {comparison.view}", *comparison.protocols],
        ["---", *["---:"] * len(comparison.protocols)],
    ]
    lines += [
        [row, *cells]
        for row, cells in zip(comparison.rows, texts(comparison, stderr=True), strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _text(cell: Cell | None, *, has_unit: bool, stderr: bool) -> str:
    if cell is None:
        return "-"
    if cell.value is None:
        return "n/f"
    scale, shown = (1, number) if has_unit else (100, "{:.1f}".format)
    error = "" if cell.stderr is None or not stderr else f" ± {shown(scale * cell.stderr)}"
    return f"{shown(scale * cell.value)}{error}"


def _name(record: EvalRecord) -> str:
    parts = [record.measurement.metric, record.measurement.task, record.measurement.subset]
    if record.measurement.timing not in ALL_EDITS_SO_FAR:
        parts.append(record.measurement.timing)
    return ", ".join(part.replace("_", " ") for part in parts if part)


def _place(record: EvalRecord) -> tuple[int, str, bool, bool, bool, str]:
    """The order of the rows. Each main metric comes before its variants, kinds of prompts, subsets
    and timings; other metrics come last.
    """
    family = next(
        (
            name
            for name in EDITING_ORDER
            if record.measurement.metric == name or record.measurement.metric.startswith(f"{name}_")
        ),
        "",
    )
    order = EDITING_ORDER.index(family) if family else len(EDITING_ORDER)
    return (
        order,
        record.measurement.metric,
        record.measurement.task is not None,
        record.measurement.subset is not None,
        record.measurement.timing not in ALL_EDITS_SO_FAR,
        record.measurement.task or "",
    )
