"""The summary of a run: a row for each view and milestone, a column for each metric.

A column holds numbers of one protocol, one timing and one version of a task. Records that would mix
them in a column are refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.report.columns import (
    TITLES,
    check_unmixed,
    headlines,
    key_of,
    place_of,
    title_of,
)
from editkit.types import EvalRecord, StepRecord

if TYPE_CHECKING:
    import pandas

# The timings in the row of a milestone. "before": the unedited model on the edits to come.
# "rollback": each batch alone on the unedited model. Its editing metrics cover all batches so far,
# its tasks and perplexity the last batch.
ALL_EDITS_SO_FAR = ("before", "milestone", "rollback", None)
UNITS = ("_bits", "_nats", "_per_token", "_tokens")  # endings of the metrics that are no fractions
# The protocol of generated texts. Its metrics stand beside those of every other protocol.
TEXT = "text"
ALONE = "each batch alone on the unedited model"  # how edits are measured with rollback
WEIGHT_COLUMNS = {"condition_number": "condition number", "l1_norm": "L1 norm"}  # title by metric
# The columns of a run that measures nothing but weights, as for PRUNE's Table 1
WEIGHTS_ALONE = WEIGHT_COLUMNS | {"total_sigma_max": "largest singular value of the total"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One number of a table. Fractions are in [0, 1]. `value` is None if it was not finite."""

    value: float | None
    stderr: float | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    title: str
    is_fraction: bool  # printed in percent


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    view: str
    edits: int
    cells: tuple[Cell | None, ...]  # one per column; None: not measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows are grouped by view and ascend in edits. The trajectory's view comes first."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    protocol: str | None  # of the editing metrics
    has_rollback: bool = False  # each batch was measured alone, on the otherwise unedited model
    is_foreign: bool = False  # another program measured the numbers

    @property
    def is_of_weights(self) -> bool:
        """Whether nothing but the weights was measured."""
        return {column.title for column in self.columns} == {*WEIGHTS_ALONE.values()}


def is_summarised(record: EvalRecord) -> bool:
    """Whether the summary of a milestone shows this record. It shows fractions over all edits so
    far and the fluency: no subsets, differences or distances.
    """
    if (
        record.measurement.timing not in ALL_EDITS_SO_FAR
        or record.measurement.kind in ("weights", "comparison")
        or record.measurement.is_part
    ):
        return False
    return (
        record.measurement.kind != "editing"
        or record.measurement.metric in TITLES
        or not record.measurement.metric.endswith(("_magnitude", "_forgetting", *UNITS))
    )


def is_fraction(kind: str, metric: str) -> bool:
    """Whether a summarised metric is a fraction, which is shown in percent."""
    return kind not in ("language", "training") and not metric.endswith(UNITS)


def edits_by_step(steps: Iterable[StepRecord]) -> dict[int, int]:
    """The number of edits in the model after each step. No step may be missing."""
    edits, total = {0: 0}, 0
    for record in sorted(steps, key=operator.attrgetter("step")):
        total += len(record.requests)
        edits[record.step] = total
    return edits


def editing_protocols(evals: Iterable[EvalRecord]) -> tuple[str | None, ...]:
    """The protocols of the editing metrics, in the order of the records. TEXT is among them only if
    it is the only one.
    """
    protocols = dict.fromkeys(
        record.measurement.protocol
        for record in evals
        if record.measurement.kind == "editing" and is_summarised(record)
    )
    return tuple(protocol for protocol in protocols if protocol != TEXT) or tuple(protocols)


def default_protocol(evals: Sequence[EvalRecord]) -> str | None:
    """`probability` (PRUNE's protocol) if it was measured, otherwise the first measured one."""
    protocols = editing_protocols(evals)
    return "probability" if "probability" in protocols or not protocols else protocols[0]


def summarise(
    steps: Sequence[StepRecord],
    evals: Sequence[EvalRecord],
    *,
    edits: Mapping[int, int],
    protocol: str | None,
    trajectory: str | None = None,
    milestones: Iterable[int] = (),
) -> Table:
    """The table of a run.

    A task is shown by the first metric that it records. The columns of the weights hold the largest
    condition number and the sum of the L1 norms over all edited matrices.

    Args:
        edits: the number of edits at each measured step (see `edits_by_step`).
        protocol: the protocol of the editing metrics. None: the only one that was measured. The
            metrics of generated texts are shown beside it.
        trajectory: the view that the steps describe. None: the first view of `evals`.
        milestones: the numbers of edits of the rows if nothing but the weights was measured.

    Raises ConfigError if a column would mix protocols, timings or task versions, or would hold two
    numbers for one view and step.
    """
    records = [
        record
        for record in evals
        if is_summarised(record)
        and (
            record.measurement.kind != "editing"
            or protocol is None
            or record.measurement.protocol in (protocol, TEXT)
        )
    ]
    if not records:
        return _table_of_weights(weight_cells(steps, evals, trajectory), edits, milestones)
    shown_steps = {record.step for record in records}  # few of a long run's
    steps = [step for step in steps if step.step in shown_steps]
    weights = weight_cells(steps, evals, trajectory)
    # sorted is stable: tasks keep the order of the file
    keys = headlines(sorted(dict.fromkeys(key_of(record) for record in records), key=place_of))
    by_key = {key: [record for record in records if key_of(record) == key] for key in keys}
    for key, of_key in by_key.items():
        check_unmixed(" ".join(part for part in key if part), of_key)
    columns = tuple(
        Column(title=title_of(key, keys), is_fraction=is_fraction(key[0], key[3])) for key in keys
    )
    cells = {
        (key, record.view, record.step): _cell(record)
        for key, of_key in by_key.items()
        for record in of_key
    }
    measured = sorted({(record.view, record.step) for record in records}, key=lambda pair: pair[1])
    rows = tuple(
        Row(
            view=view,
            edits=edits.get(step, step),
            cells=(
                *(cells.get((key, view, step)) for key in keys),
                *(weights.get((view, step), {}).get(metric) for metric in WEIGHT_COLUMNS),
            ),
        )
        for shown in dict.fromkeys(record.view for record in records)
        for view, step in measured
        if view == shown
    )
    columns += tuple(Column(title=title, is_fraction=False) for title in WEIGHT_COLUMNS.values())
    return Table(
        columns=columns,
        rows=rows,
        protocol=protocol,
        has_rollback=any(record.measurement.timing == "rollback" for record in records),
    )


def _table_of_weights(
    weights: Mapping[tuple[str, int], Mapping[str, Cell]],
    edits: Mapping[int, int],
    milestones: Iterable[int],
) -> Table:
    """The table of a run that measures nothing but weights. A milestone is the first step with at
    least that many edits.
    """
    reached = [[step for step, made in edits.items() if made >= least] for least in milestones]
    shown = {min(steps) for steps in reached if steps}
    rows = tuple(
        Row(
            view=view,
            edits=edits[step],
            cells=tuple(cells.get(metric) for metric in WEIGHTS_ALONE),
        )
        for (view, step), cells in weights.items()
        if step in shown
    )
    columns = tuple(Column(title=title, is_fraction=False) for title in WEIGHTS_ALONE.values())
    return Table(columns=columns, rows=rows, protocol=None)


def weight_cells(
    steps: Iterable[StepRecord], evals: Sequence[EvalRecord], trajectory: str | None = None
) -> dict[tuple[str, int], dict[str, Cell]]:
    """The metrics of WEIGHTS_ALONE by (view, step), over all edited matrices.

    Those of the trajectory come from the steps. The weights of a restrained view exist only while
    it is measured: its numbers come from evaluations of the kind "weights".

    Args:
        trajectory: the view that the steps describe. None: the first view of `evals`, as the runner
            measures the trajectory first.
    """
    if trajectory is None:
        trajectory = evals[0].view if evals else ""
    numbers: dict[tuple[str, int], dict[str, list[float]]] = {}
    for step in steps:
        for figures in step.modules.values():
            for metric in WEIGHTS_ALONE:
                if metric in figures:
                    numbers.setdefault((trajectory, step.step), {}).setdefault(metric, []).append(
                        figures[metric]
                    )
    for record in evals:
        if (
            record.measurement.kind == "weights"
            and record.measurement.metric in WEIGHTS_ALONE
            and record.view != trajectory
        ):
            value = math.nan if record.measurement.value is None else record.measurement.value
            numbers.setdefault((record.view, record.step), {}).setdefault(
                record.measurement.metric, []
            ).append(value)
    return {
        place: {
            metric: _finite_cell(sum(values) if metric == "l1_norm" else _largest(values))
            for metric, values in metrics.items()
        }
        for place, metrics in numbers.items()
    }


def frame(table: Table) -> pandas.DataFrame:
    """The values as a DataFrame with the index (view, edits). Fractions are in [0, 1]. A value that
    is missing or not finite is nan.
    """
    import pandas

    index = pandas.MultiIndex.from_tuples(
        [(row.view, row.edits) for row in table.rows], names=["view", "edits"]
    )
    values = [
        [math.nan if cell is None or cell.value is None else cell.value for cell in row.cells]
        for row in table.rows
    ]
    return pandas.DataFrame(
        values, index=index, columns=[column.title for column in table.columns], dtype=float
    )


def markdown(table: Table, *, stderr: bool = False) -> str:
    """A GitHub table with fractions in percent, on request with standard errors."""
    titles = ["view", "edits", *(column.title for column in table.columns)]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    lines += [
        [row.view, str(row.edits), *formatted(table, row, stderr=stderr)] for row in table.rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption(table)}\n"


def caption(table: Table) -> str:
    """The caption: protocol, units and marks."""
    if table.is_of_weights:
        return (
            "Over all edited matrices (row 0: the unedited model): the largest condition number "
            "and singular value, the sum of the L1 norms; n/f: not finite; -: not measured."
        )
    over = (
        ALONE
        if table.has_rollback
        else "as another program measured them"
        if table.is_foreign
        else "over all edits so far"
    )
    protocol = (
        f"Editing metrics by the protocol '{table.protocol}', {over}"
        if table.protocol
        else over.capitalize()
    )
    if table.has_rollback:
        protocol += "; tasks, perplexity and weights with a row's last batch alone"
    return (
        f"{protocol} (row 0: the unedited model on the edits to come); metrics and tasks in "
        "percent; n/f: not finite; -: not measured."
    )


def formatted(table: Table, row: Row, *, stderr: bool = False) -> list[str]:
    """The numbers of a row as text."""
    return [
        _text(cell, column, stderr=stderr)
        for cell, column in zip(row.cells, table.columns, strict=True)
    ]


def number(value: float) -> str:
    """Three or four significant digits: 41.2, 1,234, 3.1e+07."""
    if not math.isfinite(value):
        return "n/f"
    if value != 0 and not 1e-2 <= abs(value) < 1e6:
        return f"{value:.1e}"
    return (
        f"{value:,.0f}"
        if abs(value) >= 1000
        else f"{value:.3g}"
        if abs(value) < 1
        else f"{value:.1f}"
    )


def _text(cell: Cell | None, column: Column, *, stderr: bool) -> str:
    if cell is None:
        return "-"
    if cell.value is None:
        return "n/f"
    if not column.is_fraction:
        return number(cell.value)
    error = f" ± {100 * cell.stderr:.1f}" if stderr and cell.stderr is not None else ""
    return f"{100 * cell.value:.1f}{error}"


def _cell(record: EvalRecord) -> Cell:
    return Cell(
        value=record.measurement.value, stderr=record.measurement.stderr, n=record.measurement.n
    )


def _finite_cell(value: float) -> Cell:
    return Cell(value=value if math.isfinite(value) else None)


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)
