"""The plan of a sweep: cells, the runs that hold their results, and the file of both.

A *cell* is one combination of the grid's values. A *run* computes one trajectory of edits and
measures views of it, so several cells can share one run. A *job* is one launch of a run. The plan
is `cells.json` in the sweep's folder; `jobs/<number>.json` next to it records the end of each job.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError, message
from editkit.files import read_object, write_atomically

CELLS, JOBS, VERSION = "cells.json", "jobs", 1
# Exit codes of runs and sweeps. 128 + n: stopped by signal n.
OK, FAILURE, INVALID, BUSY, STOPPED = 0, 1, 2, 3, 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One combination of the grid's values."""

    number: int
    overrides: tuple[str, ...]
    own: Path | None  # the folder of a run of this cell alone; None if the cell is invalid
    run: int | None  # the index of the run that holds its results
    views: tuple[str, ...]  # the views of that run that belong to this cell
    problem: str | None  # why the cell is invalid

    @property
    def text(self) -> str:
        return " ".join(self.overrides)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One trajectory to compute."""

    overrides: tuple[str, ...]
    folder: Path
    edits: int
    batch_size: int
    jobs: tuple[int, ...] = ()  # the numbers under which this sweep launched it


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The cells of a sweep and their runs."""

    cells: tuple[Cell, ...]
    runs: tuple[Run, ...]

    def cells_of(self, run: int) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.run == run)

    def launched(self, jobs: Mapping[int, int]) -> Plan:
        """The plan after some runs were launched. `jobs` maps the index of a run to the number of
        its job.
        """
        runs = (
            replace(run, jobs=(*run.jobs, jobs[index])) if index in jobs else run
            for index, run in enumerate(self.runs)
        )
        return replace(self, runs=tuple(runs))


def save_plan(plan: Plan, folder: Path) -> None:
    """Writes `cells.json`. Folders are relative to the sweep's, so that the outputs can be moved as
    a whole.
    """

    def relative(path: Path | None) -> str | None:
        return None if path is None else os.path.relpath(path, folder)

    cells = [
        {"number": cell.number, "overrides": cell.overrides, "own": relative(cell.own)}
        | {"run": cell.run, "views": cell.views, "problem": cell.problem}
        for cell in plan.cells
    ]
    runs = [
        {"overrides": run.overrides, "folder": relative(run.folder)}
        | {"edits": run.edits, "batch_size": run.batch_size, "jobs": run.jobs}
        for run in plan.runs
    ]
    content = {"version": VERSION, "cells": cells, "runs": runs}
    write_atomically(folder / CELLS, json.dumps(content, indent=1).encode())


def load_plan(folder: Path) -> Plan:
    """Reads `cells.json`.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    path = folder / CELLS

    def absolute(text: str | None) -> Path | None:
        return None if text is None else Path(os.path.normpath(folder / text))

    def cell_of(values: dict[str, Any]) -> Cell:
        lists = {name: tuple(values[name]) for name in ("overrides", "views")}
        return Cell(**values | lists | {"own": absolute(values["own"])})

    def run_of(values: dict[str, Any]) -> Run:
        lists = {name: tuple(values[name]) for name in ("overrides", "jobs")}
        return Run(**values | lists | {"folder": absolute(values["folder"])})

    try:
        content = json.loads(path.read_text())
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']} instead of {VERSION}")
        return Plan(
            cells=tuple(cell_of(values) for values in content["cells"]),
            runs=tuple(run_of(values) for values in content["runs"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"cannot be read as the plan of a sweep ({error})"
        raise ConfigError(message(str(path), problem)) from None


def holds_several_cells(folder: Path, job: int) -> bool:
    """Whether the run of a job of the sweep in `folder` is shared by several cells."""
    try:
        plan = load_plan(folder)
    except ConfigError:
        return False
    return any(
        job in run.jobs and len(plan.cells_of(index)) > 1 for index, run in enumerate(plan.runs)
    )


def save_outcome(folder: Path, job: int, outcome: Mapping[str, Any]) -> None:
    """Records the end of a job of the sweep in `folder`, or its start: then `code` is None."""
    write_atomically(folder / JOBS / f"{job}.json", json.dumps(outcome, indent=1).encode())


def load_outcome(folder: Path, job: int) -> dict[str, Any] | None:
    """The recorded end of a job. None if the job has not started."""
    return read_object(folder / JOBS / f"{job}.json") or None


def record_death(folder: Path, job: int, error: str) -> None:
    """Records a job that ended without recording its end."""
    known = load_outcome(folder, job) or {}
    if known.get("code") is None:
        save_outcome(folder, job, known | {"code": FAILURE, "error": error})
