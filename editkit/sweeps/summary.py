"""A sweep in words and in a table: what is planned, how it stands, and with which exit code it
ends.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.records.views import UNRESTRAINED
from editkit.sweeps.plan import Cell, Plan, load_outcome
from editkit.sweeps.state import STATES, RunStatus, look

if TYPE_CHECKING:
    from rich.table import Table

OK, FAILURE, MISTAKE, BUSY, STOPPED_BY_HAND = (
    0,
    1,
    2,
    3,
    130,
)  # exit codes of a sweep and of its jobs


def statuses_of(plan: Plan, folder: Path) -> list[RunStatus]:
    """The status of every run; what a job could not write into the run's own folder comes from its
    outcome.
    """
    found = []
    for run in plan.runs:
        outcome = _last_outcome(run.jobs, folder) or {}
        wrote = (
            Path(os.path.normpath(folder / outcome["folder"]))
            if outcome.get("folder")
            else run.folder
        )
        status = look(wrote)
        if status.state in ("missing", "cut off") and outcome.get("error"):
            status = replace(
                status,
                state="failed" if outcome.get("code") == MISTAKE else status.state,
                error=outcome["error"],
            )
        if wrote.absolute() != run.folder.absolute():
            status = replace(
                status, error=f"the configuration changed after the sweep was planned: see {wrote}"
            )
        found.append(status)
    return found


def _last_outcome(jobs: Sequence[int], folder: Path) -> dict[str, Any] | None:
    return load_outcome(folder, jobs[-1]) if jobs else None


def announcement(plan: Plan, statuses: Sequence[RunStatus], launched: Sequence[int]) -> list[str]:
    """What a person should know before the jobs start."""
    numbers = Counter(statuses[place].state for place in range(len(plan.runs)))
    begun = [place for place in launched if statuses[place].state == "cut off"]
    lines = [
        f"{counted(len(plan.cells), 'cell')} in {counted(len(plan.runs), 'run')}: {counted(len(launched), 'job')} to do"
    ]
    if shared := sharing(plan):
        lines.append(f"views of one trajectory share its run: {shared}")
    if done := sum(
        1
        for place in range(len(plan.runs))
        if statuses[place].state == "done" and place not in launched
    ):
        lines.append(f"{counted(done, 'run')} done before: skipped")
    for place in begun:
        lines.append(
            f"goes on after step {statuses[place].saved_step or 0}: {' '.join(plan.runs[place].overrides)}"
        )
    if failed := sum(
        1
        for place in range(len(plan.runs))
        if statuses[place].state == "failed" and place not in launched
    ):
        lines.append(
            f"{counted(failed, 'run')} failed before: left alone (retry_failed=true tries again)"
        )
    if numbers["running"]:
        lines.append(f"{counted(numbers['running'], 'run')} being written by another process")
    return lines


def sharing(plan: Plan) -> str:
    """Which views share a run, and in how many runs: `unrestrained + prune (6 runs)`."""
    shared = Counter(
        " + ".join(
            sorted(
                {view for cell in cells for view in cell.views},
                key=lambda view: (view != UNRESTRAINED, view),
            )
        )
        for place in range(len(plan.runs))
        if len(cells := plan.cells_of(place)) > 1
    )
    return ", ".join(f"{views} ({counted(number, 'run')})" for views, number in shared.items())


def cell_state(cell: Cell, statuses: Sequence[RunStatus]) -> RunStatus:
    """The status of the run that holds a cell."""
    return RunStatus(state="failed", error=cell.problem) if cell.run is None else statuses[cell.run]


def table(plan: Plan, statuses: Sequence[RunStatus]) -> Table:
    """A line for each cell: its state, its last edit, its error."""
    from rich.table import Table
    from rich.text import Text

    colours = {
        "done": "green",
        "running": "cyan",
        "failed": "red",
        "cut off": "yellow",
        "missing": "dim",
    }
    made = Table("cell", "state", "edits", "values", "what", box=None, pad_edge=False)
    varying = _varying(plan)
    for cell in plan.cells:
        status = cell_state(cell, statuses)
        state = Text(status.state, style=colours[status.state])
        made.add_row(
            str(cell.number),
            state,
            edits_of(cell, plan, status),
            values_of(cell, varying),
            _what(cell, plan, status),
        )
    return made


def values_of(cell: Cell, varying: set[str]) -> str:
    """What tells a cell from the others."""
    return (
        " ".join(each for each in cell.overrides if each.partition("=")[0] in varying) or cell.text
    )


def _varying(plan: Plan) -> set[str]:
    """The keys whose values are not the same in every cell."""
    seen: dict[str, set[str]] = {}
    for cell in plan.cells:
        for override in cell.overrides:
            seen.setdefault(override.partition("=")[0], set()).add(override)
    return {key for key, values in seen.items() if len(values) > 1}


def edits_of(cell: Cell, plan: Plan, status: RunStatus) -> str:
    """`37/100`; `-` where nothing was recorded."""
    if cell.run is None:
        return "-"
    run = plan.runs[cell.run]
    return f"{'-' if status.step is None else min(status.step * run.batch_size, run.edits)}/{run.edits}"


def _what(cell: Cell, plan: Plan, status: RunStatus) -> str:
    """The error or the holder; and with whom the cell shares its run."""
    said = [shortened(status.error), f"by {status.holder}" if status.holder else None]
    if status.state == "cut off":
        said.append(f"goes on after step {status.saved_step or 0}")
    if cell.run is not None and len(plan.cells_of(cell.run)) > 1:
        others = [each.number for each in plan.cells_of(cell.run) if each.number != cell.number]
        said.append(f"view {' + '.join(cell.views)}, in one run with {', '.join(map(str, others))}")
    return "; ".join(each for each in said if each)


def counts(plan: Plan, statuses: Sequence[RunStatus]) -> str:
    """`3 done, 0 running, 1 failed, 0 cut off, 2 missing of 6 cells`."""
    found = Counter(cell_state(cell, statuses).state for cell in plan.cells)
    return f"{', '.join(f'{found[state]} {state}' for state in STATES)} of {counted(len(plan.cells), 'cell')}"


def closing(plan: Plan, statuses: Sequence[RunStatus], before: Sequence[RunStatus]) -> list[str]:
    """How the sweep ended; `before` may know fewer runs, as some were only made on the way."""
    lines, varying = [counts(plan, statuses)], _varying(plan)
    for cell in plan.cells:
        status = cell_state(cell, statuses)
        if status.state in ("failed", "cut off"):
            what = (
                "its configuration, see above"
                if cell.run is None
                else _what(cell, plan, status) or "no reason is known"
            )
            lines.append(f"{status.state}: cell {cell.number} ({values_of(cell, varying)}): {what}")
    went_on = sum(1 for status in before if status.state == "cut off")
    again = sum(
        max(0, now.steps_made_again - then.steps_made_again)
        for now, then in zip(statuses, before, strict=False)
    )
    if went_on or again:
        lines.append(
            f"{counted(went_on, 'run')} went on from a checkpoint; {counted(again, 'step')} made again"
        )
    return lines


def exit_code(plan: Plan, statuses: Sequence[RunStatus], folder: Path) -> int:
    """That of the first cell that did not end well; 3 where the only thing missing is with another
    process.
    """
    codes = [_code(cell, plan, statuses, folder) for cell in plan.cells]
    return next((code for code in codes if code not in (OK, BUSY)), BUSY if BUSY in codes else OK)


def _code(cell: Cell, plan: Plan, statuses: Sequence[RunStatus], folder: Path) -> int:
    if cell.run is None:
        return MISTAKE
    status = statuses[cell.run]
    if status.state in ("done", "running"):
        return OK if status.state == "done" else BUSY
    outcome: Mapping[str, Any] = _last_outcome(plan.runs[cell.run].jobs, folder) or {}
    return outcome.get("code") or FAILURE


def shortened(text: str | None, limit: int = 300) -> str | None:
    """The whole of it is in the run's FAILED.json, or in the sweep's jobs/<number>.json."""
    return text if text is None or len(text) <= limit else text[: limit - 3] + "..."


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
