"""The summary over seeds: a row per model, editor and restraint, a column per metric, mean and
standard deviation.

A table stands at one number of edits, of one dataset, and its editing metrics are of one protocol;
protocols never meet in one. Nothing is dropped: where one seed's number was not finite, the mean is
not.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from editkit.records.foreign import FOREIGN
from editkit.report.compare.subjects import Measured
from editkit.report.figures.panels import WEIGHTS, weights_by_edits
from editkit.report.tables import (
    ALONE,
    WEIGHT_COLUMNS,
    WEIGHTS_ALONE,
    Cell,
    editing_protocols,
    edits_by_step,
    is_summarised,
    number,
    summarise,
)
from editkit.types import EvalRecord

LAST_ALONE = "the last batch alone in the model"
LOWER_IS_BETTER = ("perplexity", "forgetting", "kl")  # in a metric's name
SECONDS = "seconds an edit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A metric over seeds; fractions in [0, 1]."""

    values: tuple[float, ...]  # nan where a seed's was not finite
    is_best: bool = False

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.num_lost == 0 else math.nan

    @property
    def sd(self) -> float | None:
        """The sample standard deviation; None of fewer than two seeds, or where a number was not
        finite.
        """
        return (
            statistics.stdev(self.values) if len(self.values) > 1 and self.num_lost == 0 else None
        )

    @property
    def num_lost(self) -> int:
        return sum(not math.isfinite(value) for value in self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryColumn:
    title: str
    is_fraction: bool
    better: Literal["higher", "lower"] | None  # None: neither, as of the weights


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryRow:
    model: str
    editor: str
    restraint: str
    subject: str
    seeds: tuple[int, ...]
    num_runs: int  # how many seeds there are; more than `seeds` where some did not come so far
    cells: tuple[Mean | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """`protocol` is that of the editing metrics, None of the table of general abilities and
    weights. `manner` says what is unusual about the measurement, as the title does.
    """

    title: str
    dataset: str
    edits: int
    protocol: str | None
    is_editing: bool
    manner: str = ""
    columns: tuple[SummaryColumn, ...]
    rows: tuple[SummaryRow, ...]

    @property
    def is_of_all_edits(self) -> bool:
        """Whether the numbers are those of all edits so far, on top of each other."""
        return not any(way in self.manner for way in (ALONE, LAST_ALONE, FOREIGN))


_Cells = Mapping[tuple[str, int], Mapping[str, Cell]]  # title -> cell, by view and edits


def summaries(subjects: Sequence[Measured]) -> tuple[Summary, ...]:
    """All tables: by dataset, the most edits first; of each number of edits one per protocol, and
    one of tasks and weights.

    Raises ConfigError if a column would mix protocols, timings or versions of a task, as
    `tables.summarise` does.
    """
    tables = {id(run_view): _tables(run_view) for run_view in subjects}
    shown = []
    for dataset in dict.fromkeys(run_view.dataset for run_view in subjects):
        here = [run_view for run_view in subjects if run_view.dataset == dataset]
        kinds = list(dict.fromkeys(kind for run_view in here for kind in tables[id(run_view)]))
        measured = {
            edits for run_view in here for rows in tables[id(run_view)].values() for edits in rows
        }
        for edits in sorted(measured, reverse=True):
            for kind in sorted(kinds, key=lambda kind: (kind[0] != "editing", kinds.index(kind))):
                if table := _summary(
                    here,
                    {id(run_view): tables[id(run_view)].get(kind, {}) for run_view in here},
                    dataset,
                    edits,
                    kind,
                ):
                    shown.append(table)
    return tuple(shown)


_Kind = tuple[
    str, str | None, str
]  # ("editing", protocol, how else it was measured) or ("abilities", None, how else)


def _tables(run_view: Measured) -> dict[_Kind, dict[int, dict[str, tuple[Cell, SummaryColumn]]]]:
    """What the tables hold of one subject's run: by kind of table and edits, cell and column by
    title.
    """
    run, edits = run_view.run, edits_by_step(run_view.run.steps)
    kinds: list[_Kind] = [
        *(
            ("editing", protocol, _manner(run.evals, protocol))
            for protocol in editing_protocols(run.evals)
        )
    ]
    kinds.append(
        (
            "abilities",
            None,
            LAST_ALONE if any(r.measurement.timing == "rollback" for r in run.evals) else "",
        )
    )
    by_kind: dict[_Kind, dict[int, dict[str, tuple[Cell, SummaryColumn]]]] = {}
    for kind in kinds:
        evals = [
            record
            for record in run.evals
            if (record.measurement.kind == "editing") == (kind[0] == "editing")
        ]
        table = summarise(run.steps, evals, edits=edits, protocol=kind[1])
        by_edits = by_kind.setdefault(kind, {})
        for row in table.rows:
            if row.view != run_view.view:
                continue
            cells = {
                column.title: (
                    cell,
                    SummaryColumn(
                        title=column.title,
                        is_fraction=column.is_fraction,
                        better=_better(column.title),
                    ),
                )
                for column, cell in zip(table.columns, row.cells, strict=True)
                if cell is not None
                and (column.title in WEIGHT_COLUMNS.values()) <= (kind[0] != "editing")
            }
            by_edits[row.edits] = cells
        if kind[0] != "editing":
            _add_weights(by_edits, run_view)
            for at, cells in by_edits.items():
                if (seconds := seconds_an_edit(run_view, at, edits)) is not None:
                    cells[SECONDS] = (
                        Cell(value=seconds),
                        SummaryColumn(title=SECONDS, is_fraction=False, better=None),
                    )
    return by_kind


def _manner(evals: Sequence[EvalRecord], protocol: str | None) -> str:
    """In which ways the editing metrics of a protocol differ from the usual: runs that differ there
    share no table.
    """
    records = [
        record
        for record in evals
        if record.measurement.kind == "editing"
        and record.measurement.protocol == protocol
        and is_summarised(record)
    ]
    ways = [ALONE] if any(record.measurement.timing == "rollback" for record in records) else []
    ways += [
        f"mean over {unit}s"
        for unit in sorted(
            {
                r.measurement.aggregation
                for r in records
                if r.measurement.aggregation not in (None, "request")
            },
            key=str,
        )
    ]
    ways += [
        f"context {template!r}"
        for template in sorted(
            {r.measurement.context for r in records if r.measurement.context not in (None, "{}")},
            key=str,
        )
    ]
    variants = {record.measurement.variant or "" for record in records}
    ways += sorted(variant for variant in variants if variant.startswith(FOREIGN))
    return ", ".join(ways)


def _add_weights(
    by_edits: dict[int, dict[str, tuple[Cell, SummaryColumn]]], run_view: Measured
) -> None:
    """The weights at milestones at which no task was measured."""
    is_alone = not any(is_summarised(record) for record in run_view.run.evals)
    for metric, title in (WEIGHTS_ALONE if is_alone else WEIGHT_COLUMNS).items():
        _, _, together = WEIGHTS[metric]
        values = weights_by_edits(run_view, metric, together)
        column = SummaryColumn(title=title, is_fraction=False, better=None)
        for at in run_view.run.config.get("milestones") or ():
            if at in values and title not in by_edits.get(at, {}):
                by_edits.setdefault(at, {})[title] = (
                    Cell(value=values[at] if math.isfinite(values[at]) else None),
                    column,
                )


def _summary(
    here: Sequence[Measured],
    tables: Mapping[int, Mapping[int, Mapping[str, tuple[Cell, SummaryColumn]]]],
    dataset: str,
    edits: int,
    kind: _Kind,
) -> Summary | None:
    at = {id(run_view): tables[id(run_view)].get(edits, {}) for run_view in here}
    columns = {title: column for cells in at.values() for title, (_, column) in cells.items()}
    if not columns:
        return None
    ordered = sorted(
        columns.values(),
        key=lambda column: (column.title == SECONDS, column.title in WEIGHTS_ALONE.values()),
    )
    rows = []
    for subject in dict.fromkeys(run_view.subject for run_view in here):
        runs = sorted(
            (run_view for run_view in here if run_view.subject == subject),
            key=lambda run_view: run_view.seed,
        )
        reached = [run_view for run_view in runs if at[id(run_view)]]
        if not reached:
            continue
        cells = []
        for column in ordered:
            values = [
                at[id(run_view)][column.title][0].value
                for run_view in reached
                if column.title in at[id(run_view)]
            ]
            numbers = tuple(math.nan if value is None else value for value in values)
            cells.append(Mean(values=numbers) if numbers else None)
        model, editor, restraint = runs[0].label
        rows.append(
            SummaryRow(
                model=model,
                editor=editor,
                restraint=restraint,
                subject=subject,
                seeds=tuple(run_view.seed for run_view in reached),
                num_runs=len(runs),
                cells=tuple(cells),
            )
        )
    rows.sort(key=lambda row: (row.model, row.editor, row.restraint != "none"))
    name = (
        f"editing, protocol {kind[1]}"
        if kind[0] == "editing" and kind[1]
        else "editing"
        if kind[0] == "editing"
        else "abilities and weights"
    )
    return Summary(
        title=f"{dataset}, {edits} edits: {name}{f' ({kind[2]})' if kind[2] else ''}",
        dataset=dataset,
        edits=edits,
        protocol=kind[1],
        manner=kind[2],
        is_editing=kind[0] == "editing",
        columns=tuple(ordered),
        rows=tuple(_with_best(rows, ordered)) if edits else tuple(rows),
    )


def _with_best(
    rows: Sequence[SummaryRow], columns: Sequence[SummaryColumn]
) -> Iterable[SummaryRow]:
    """Marks the best mean of each column among the rows of one model, if there is more than one to
    choose from.
    """
    best: dict[tuple[str, int], float] = {}
    for place, column in enumerate(columns):
        for model in {row.model for row in rows}:
            of_model = (row.cells[place] for row in rows if row.model == model)
            means = [cell.mean for cell in of_model if cell is not None]
            finite = [mean for mean in means if math.isfinite(mean)]
            if column.better is not None and len(means) > 1 and finite:
                best[model, place] = max(finite) if column.better == "higher" else min(finite)
    for row in rows:
        cells = [
            cell
            if cell is None
            else Mean(
                values=cell.values,
                is_best=math.isclose(
                    cell.mean, best.get((row.model, place), math.nan), rel_tol=1e-9
                ),
            )
            for place, cell in enumerate(row.cells)
        ]
        yield SummaryRow(
            model=row.model,
            editor=row.editor,
            restraint=row.restraint,
            subject=row.subject,
            seeds=row.seeds,
            num_runs=row.num_runs,
            cells=tuple(cells),
        )


def text_of(cell: Mean | None, column: SummaryColumn) -> str:
    """Mean and standard deviation as a person reads them; fractions in percent."""
    if cell is None:
        return "-"
    if cell.num_lost:
        return (
            "n/f"
            if cell.num_lost == len(cell.values)
            else f"n/f ({cell.num_lost} of {len(cell.values)})"
        )
    if not column.is_fraction:
        return number(cell.mean) + (
            f" ± {cell.sd:,.0f}"
            if (cell.sd or 0) >= 100
            else f" ± {cell.sd:.2g}"
            if cell.sd is not None
            else ""
        )
    return f"{100 * cell.mean:.1f}" + (f" ± {100 * cell.sd:.1f}" if cell.sd is not None else "")


def _better(title: str) -> Literal["higher", "lower"] | None:
    if title in WEIGHT_COLUMNS.values():
        return None
    return (
        "lower"
        if any(part in title.lower().replace("_", " ").split() for part in LOWER_IS_BETTER)
        else "higher"
    )


def seconds_an_edit(run_view: Measured, at: int, edits: Mapping[int, int]) -> float | None:
    """Mean seconds of an edit up to there, telemetry left out; of the trajectory, which all views
    share.
    """
    spent = [
        (
            sum(seconds for phase, seconds in step.seconds.items() if phase != "telemetry"),
            len(step.requests),
        )
        for step in run_view.run.steps
        if step.seconds and edits.get(step.step, 0) <= at
    ]
    count = sum(num for _, num in spent)
    return sum(seconds for seconds, _ in spent) / count if count else None
