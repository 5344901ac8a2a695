"""Reports of a sweep: the plan, the state of its cells as a table, the end, and the exit code."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.records.views import UNRESTRAINED
from editkit.sweeps.grid import varying_keys, varying_values
from editkit.sweeps.plan import BUSY, FAILURE, INVALID, OK, Cell, Plan, load_outcome
from editkit.sweeps.state import STATES, RunStatus, State, read_status

if TYPE_CHECKING:
    from rich.table import Table

COLOURS: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "failed": "red",
    "interrupted": "yellow",
    "missing": "dim",
}


def statuses_of(plan: Plan, folder: Path) -> list[RunStatus]:
    """The status of every run. If a job could not write into the folder of its run, the recorded
    end of the job counts.
    """
    statuses = []
    for run in plan.runs:
        outcome = _last_outcome(run.jobs, folder) or {}
        written = run.folder
        if outcome.get("folder"):
            written = Path(os.path.normpath(folder / outcome["folder"]))
        status = read_status(written)
        if status.state in ("missing", "interrupted") and outcome.get("error"):
            status = replace(
                status,
                state="failed" if outcome.get("code") == INVALID else status.state,
                error=outcome["error"],
            )
        if written.absolute() != run.folder.absolute():
            error = f"the configuration changed after the sweep was planned: see {written}"
            status = replace(status, error=error)
        statuses.append(status)
    return statuses


def _last_outcome(jobs: Sequence[int], folder: Path) -> dict[str, Any] | None:
    return load_outcome(folder, jobs[-1]) if jobs else None


def opening_lines(plan: Plan, statuses: Sequence[RunStatus], launched: Sequence[int]) -> list[str]:
    """The lines that are shown before the jobs start."""
    idle = Counter(status.state for index, status in enumerate(statuses) if index not in launched)
    running = sum(status.state == "running" for status in statuses)
    cells, runs = counted(len(plan.cells), "cell"), counted(len(plan.runs), "run")
    lines = [f"{cells} in {runs}: {counted(len(launched), 'job')} to do"]
    if shared := shared_views(plan):
        lines.append(f"views of one trajectory share its run: {shared}")
    if idle["done"]:
        lines.append(f"{counted(idle['done'], 'run')} already done: skipped")
    for index in launched:
        if statuses[index].state == "interrupted":
            overrides = " ".join(plan.runs[index].overrides)
            lines.append(f"{resumes(statuses[index])}: {overrides}")
    if idle["failed"]:
        failed = counted(idle["failed"], "run")
        lines.append(f"{failed} failed before: skipped (retry_failed=true retries)")
    if running:
        lines.append(f"{counted(running, 'run')} being written by another process")
    return lines


def shared_views(plan: Plan) -> str:
    """The views that share a run, and the number of such runs: `unrestrained + prune (6 runs)`."""
    shared = Counter(
        " + ".join(
            sorted(
                {view for cell in cells for view in cell.views},
                key=lambda view: (view != UNRESTRAINED, view),
            )
        )
        for index in range(len(plan.runs))
        if len(cells := plan.cells_of(index)) > 1
    )
    return ", ".join(f"{views} ({counted(number, 'run')})" for views, number in shared.items())


def cell_status(cell: Cell, statuses: Sequence[RunStatus]) -> RunStatus:
    """The status of the run that holds the results of a cell."""
    return RunStatus(state="failed", error=cell.problem) if cell.run is None else statuses[cell.run]


def table(plan: Plan, statuses: Sequence[RunStatus]) -> Table:
    """A row for each cell: its state, its last edit, its error."""
    from rich.table import Table
    from rich.text import Text

    shown = Table("cell", "state", "edits", "values", "details", box=None, pad_edge=False)
    varying = _varying(plan)
    for cell in plan.cells:
        status = cell_status(cell, statuses)
        shown.add_row(
            str(cell.number),
            Text(status.state, style=COLOURS[status.state]),
            edits_of(cell, plan, status),
            values_of(cell, varying),
            _details(cell, plan, status),
        )
    return shown


def values_of(cell: Cell, varying: set[str]) -> str:
    """The values of a cell that are not the same in every cell."""
    return varying_values(cell.overrides, varying) or cell.text


def _varying(plan: Plan) -> set[str]:
    return varying_keys(cell.overrides for cell in plan.cells)


def edits_of(cell: Cell, plan: Plan, status: RunStatus) -> str:
    """`37/100`; `-` instead of 37 if nothing was recorded."""
    if cell.run is None:
        return "-"
    run = plan.runs[cell.run]
    made = "-" if status.step is None else min(status.step * run.batch_size, run.edits)
    return f"{made}/{run.edits}"


def resumes(status: RunStatus) -> str:
    return f"resumes after step {status.saved_step or 0}"


def _details(cell: Cell, plan: Plan, status: RunStatus) -> str:
    """The error or the writing process, and the cells that share the run."""
    details = [shortened(status.error), f"by {status.holder}" if status.holder else None]
    if status.state == "interrupted":
        details.append(resumes(status))
    if cell.run is not None and len(plan.cells_of(cell.run)) > 1:
        others = (
            str(other.number) for other in plan.cells_of(cell.run) if other.number != cell.number
        )
        views = " + ".join(cell.views)
        details.append(f"view {views}, in one run with {', '.join(others)}")
    return "; ".join(detail for detail in details if detail)


def counts(plan: Plan, statuses: Sequence[RunStatus]) -> str:
    """`3 done, 0 running, 1 failed, 0 interrupted, 2 missing of 6 cells`."""
    by_state = Counter(cell_status(cell, statuses).state for cell in plan.cells)
    states = ", ".join(f"{by_state[state]} {state}" for state in STATES)
    return f"{states} of {counted(len(plan.cells), 'cell')}"


def closing_lines(
    plan: Plan, statuses: Sequence[RunStatus], before: Sequence[RunStatus]
) -> list[str]:
    """The lines that are shown at the end. `before` holds the statuses at the start; runs that were
    added since are missing from it.
    """
    lines, varying = [counts(plan, statuses)], _varying(plan)
    for cell in plan.cells:
        status = cell_status(cell, statuses)
        if status.state in ("failed", "interrupted"):
            details = "invalid configuration, see above"
            if cell.run is not None:
                details = _details(cell, plan, status) or "no reason is known"
            values = values_of(cell, varying)
            lines.append(f"{status.state}: cell {cell.number} ({values}): {details}")
    resumed = sum(status.state == "interrupted" for status in before)
    made_again = sum(
        max(0, now.steps_made_again - then.steps_made_again)
        for now, then in zip(statuses, before, strict=False)
    )
    if resumed or made_again:
        runs, steps = counted(resumed, "run"), counted(made_again, "step")
        lines.append(f"{runs} resumed from a checkpoint; {steps} made again")
    return lines


def exit_code(plan: Plan, statuses: Sequence[RunStatus], folder: Path) -> int:
    """The exit code of the first cell that failed. It is 3 if other processes are writing all cells
    that are not done.
    """
    codes = [_code(cell, plan, statuses, folder) for cell in plan.cells]
    return next((code for code in codes if code not in (OK, BUSY)), BUSY if BUSY in codes else OK)


def _code(cell: Cell, plan: Plan, statuses: Sequence[RunStatus], folder: Path) -> int:
    if cell.run is None:
        return INVALID
    status = statuses[cell.run]
    if status.state in ("done", "running"):
        return OK if status.state == "done" else BUSY
    outcome: Mapping[str, Any] = _last_outcome(plan.runs[cell.run].jobs, folder) or {}
    return outcome.get("code") or FAILURE


def shortened(text: str | None, limit: int = 300) -> str | None:
    """The beginning of a long error. FAILED.json of the run or jobs/<number>.json of the sweep
    hold all of it.
    """
    return text if text is None or len(text) <= limit else text[: limit - 3] + "..."


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
