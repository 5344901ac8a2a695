"""The summary of a run: a row for each view and milestone, a column for each metric.

A column holds numbers of one protocol, one timing and one version of a task. Records that would mix
them in a column are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.errors import ConfigError
from editkit.types import EvalRecord, StepRecord

if TYPE_CHECKING:
    import pandas

EDITING_ORDER = ("efficacy", "generalization", "locality", "portability", "score")
# The timings in the row of a milestone. "before": the unedited model on the edits to come.
# "rollback": each batch alone on the unedited model. Its editing metrics cover all batches so far,
# its tasks and perplexity the last batch.
ALL_EDITS_SO_FAR = ("before", "milestone", "rollback", None)
UNITS = ("_bits", "_nats", "_per_token")  # endings of the metrics that are no fractions
WEIGHT_COLUMNS = {"condition_number": "condition number", "l1_norm": "L1 norm"}  # title by metric


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


def is_summarised(record: EvalRecord) -> bool:
    """Whether the summary of a milestone shows this record. It shows fractions over all edits so
    far: no subsets, differences or distances.
    """
    if (
        record.measurement.timing not in ALL_EDITS_SO_FAR
        or record.measurement.kind in ("weights", "comparison")
        or record.measurement.is_part
    ):
        return False
    return record.measurement.kind != "editing" or not record.measurement.metric.endswith(
        ("_magnitude", "_forgetting", *UNITS)
    )


def edits_by_step(steps: Iterable[StepRecord]) -> dict[int, int]:
    """The number of edits in the model after each step. No step may be missing."""
    edits, total = {0: 0}, 0
    for record in sorted(steps, key=lambda record: record.step):
        total += len(record.requests)
        edits[record.step] = total
    return edits


def editing_protocols(evals: Iterable[EvalRecord]) -> tuple[str | None, ...]:
    """The protocols of the editing metrics, in the order of the records."""
    return tuple(
        dict.fromkeys(
            record.measurement.protocol
            for record in evals
            if record.measurement.kind == "editing" and is_summarised(record)
        )
    )


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
) -> Table:
    """The table of a run.

    A task is shown by the first metric that it records. The columns of the weights hold the largest
    condition number and the sum of the L1 norms over all edited matrices.

    Args:
        edits: the number of edits at each measured step (see `edits_by_step`).
        protocol: the protocol of the editing metrics. None: the only one that was measured.

    Raises ConfigError if a column would mix protocols, timings or task versions, or would hold two
    numbers for one view and step.
    """
    records = [
        record
        for record in evals
        if is_summarised(record)
        and (
            record.measurement.kind != "editing" or protocol in (None, record.measurement.protocol)
        )
    ]
    # sorted is stable: tasks keep the order of the file
    keys = _headlines(sorted(dict.fromkeys(_key(record) for record in records), key=_place))
    by_key = {key: [record for record in records if _key(record) == key] for key in keys}
    for key, of_key in by_key.items():
        _check_unmixed(" ".join(part for part in key if part), of_key)
    columns = tuple(
        Column(title=_title(key, keys), is_fraction=key[0] not in ("language", "training"))
        for key in keys
    )
    cells = {
        (key, record.view, record.step): _cell(record)
        for key, of_key in by_key.items()
        for record in of_key
    }
    weights = weight_cells(steps, evals)
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


def weight_cells(
    steps: Iterable[StepRecord], evals: Sequence[EvalRecord]
) -> dict[tuple[str, int], dict[str, Cell]]:
    """Condition number and L1 norm by (view, step).

    Those of the trajectory come from the steps. The weights of a restrained view exist only while
    it is measured: its numbers come from evaluations of the kind "weights".
    """
    # the runner measures the trajectory's view first
    trajectory = evals[0].view if evals else ""
    numbers: dict[tuple[str, int], dict[str, list[float]]] = {}
    for step in steps:
        for figures in step.modules.values():
            for metric in WEIGHT_COLUMNS:
                if metric in figures:
                    numbers.setdefault((trajectory, step.step), {}).setdefault(metric, []).append(
                        figures[metric]
                    )
    for record in evals:
        if (
            record.measurement.kind == "weights"
            and record.measurement.metric in WEIGHT_COLUMNS
            and record.view != trajectory
        ):
            value = math.nan if record.measurement.value is None else record.measurement.value
            numbers.setdefault((record.view, record.step), {}).setdefault(
                record.measurement.metric, []
            ).append(value)
    return {
        place: {
            metric: _finite_cell(_largest(values) if metric == "condition_number" else sum(values))
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
    over = (
        "each batch alone on the unedited model" if table.has_rollback else "over all edits so far"
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


_Key = tuple[
    Literal["editing", "downstream", "language"] | str, str, str, str
]  # kind, suite, task, metric


def _key(record: EvalRecord) -> _Key:
    return (
        record.measurement.kind,
        record.measurement.suite or "",
        record.measurement.task or "",
        record.measurement.metric,
    )


def _place(key: _Key) -> tuple[int, int]:
    kind, _, _, metric = key
    kinds = ("editing", "downstream", "language")
    order = EDITING_ORDER.index(metric) if metric in EDITING_ORDER else len(EDITING_ORDER) - 1
    return kinds.index(kind) if kind in kinds else len(kinds), order if kind == "editing" else 0


def _headlines(keys: Sequence[_Key]) -> list[_Key]:
    """The keys without the second and later metrics of each task."""
    first = {key[:3]: key for key in reversed(keys)}
    return [key for key in keys if key[0] == "editing" or first[key[:3]] == key]


def _title(key: _Key, keys: Sequence[_Key]) -> str:
    """The shortest name that no other column has: the task, if necessary with suite and metric."""
    kind, suite, task, metric = key
    if not task:
        return metric
    of_task = [other for other in keys if other[2] == task]
    named_suite = f"{suite}/{task}" if suite and len({other[1] for other in of_task}) > 1 else task
    return (
        f"{named_suite} {metric}"
        if kind == "editing" or len({other[3] for other in of_task}) > 1
        else named_suite
    )


def _check_unmixed(name: str, records: Sequence[EvalRecord]) -> None:
    for field in (
        "protocol",
        "task_version",
        "shots",
        "aggregation",
        "context",
        "max_new_tokens",
        "max_tokens",
        "dataset",
    ):
        values = list(
            dict.fromkeys(
                getattr(record.measurement, field) if field != "dataset" else record.dataset
                for record in records
            )
        )
        if field == "shots":
            # None: old records, and groups of tasks
            values = [value for value in values if value is not None]
        if len(values) > 1:
            given = ", ".join(str(value) for value in values)
            raise ConfigError(
                f"one column of the table would mix values of {field}: '{name}' was measured with "
                f"{given}. Choose one of them."
            )
    if {"milestone", "rollback"} <= {record.measurement.timing for record in records}:
        raise ConfigError(
            "one column of the table would mix edits that add up with edits that were taken "
            f"back: '{name}'. Choose one of them."
        )
    seen: set[tuple[str, int]] = set()
    for record in records:
        place = (record.view, record.step)
        if place in seen:
            raise ConfigError(
                f"'{name}' was measured twice for view '{record.view}' at step {record.step}: the "
                "table cannot say which one counts."
            )
        seen.add(place)


def _finite_cell(value: float) -> Cell:
    return Cell(value=value if math.isfinite(value) else None)


def _largest(values: Sequence[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)
