"""What a sweep is: cells, the runs that hold their results, and both as a file.

A *cell* is one combination of the grid's values. A *run* makes one trajectory of edits and measures
views of it, so several cells can share one run. The plan is `cells.json` in the sweep's folder;
beside it `jobs/<number>.json` say how each job that was launched ended.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError
from editkit.files import read_object, write_atomically

CELLS, JOBS, VERSION = "cells.json", "jobs", 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One combination of the grid's values."""

    number: int
    overrides: tuple[str, ...]
    own: Path | None  # where it would write by itself; None where it cannot be run
    run: int | None  # which run holds its results
    views: tuple[str, ...]  # what of that run is this cell's
    problem: str | None  # why it cannot be run

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
    """A sweep."""

    cells: tuple[Cell, ...]
    runs: tuple[Run, ...]

    def cells_of(self, run: int) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.run == run)

    def launched(self, jobs: Mapping[int, int]) -> Plan:
        """The plan after these runs were launched once more; `jobs` says as which number, by the
        run's place.
        """
        runs = (
            replace(run, jobs=(*run.jobs, jobs[place])) if place in jobs else run
            for place, run in enumerate(self.runs)
        )
        return replace(self, runs=tuple(runs))


def save_plan(plan: Plan, folder: Path) -> None:
    """Writes `cells.json`; folders are relative to the sweep's, so that a whole outputs folder can
    be moved.
    """

    def relative(path: Path | None) -> str | None:
        return None if path is None else os.path.relpath(path, folder)

    cells = [
        {"number": each.number, "overrides": each.overrides, "own": relative(each.own)}
        | {"run": each.run, "views": each.views, "problem": each.problem}
        for each in plan.cells
    ]
    runs = [
        {"overrides": each.overrides, "folder": relative(each.folder)}
        | {"edits": each.edits, "batch_size": each.batch_size, "jobs": each.jobs}
        for each in plan.runs
    ]
    write_atomically(
        folder / CELLS,
        json.dumps({"version": VERSION, "cells": cells, "runs": runs}, indent=1).encode(),
    )


def load_plan(folder: Path) -> Plan:
    """Reads `cells.json`. Raises ConfigError where it cannot be read."""
    path = folder / CELLS
    try:
        found = json.loads(path.read_text())
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']}, {VERSION} was expected")

        def absolute(text: str | None) -> Path | None:
            return None if text is None else Path(os.path.normpath(folder / text))

        cells = tuple(
            Cell(
                **each
                | {
                    "overrides": tuple(each["overrides"]),
                    "views": tuple(each["views"]),
                    "own": absolute(each["own"]),
                }
            )
            for each in found["cells"]
        )
        runs = tuple(
            Run(
                **each
                | {
                    "overrides": tuple(each["overrides"]),
                    "jobs": tuple(each["jobs"]),
                    "folder": absolute(each["folder"]),
                }
            )
            for each in found["runs"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read as a sweep's plan ({error}).") from None
    return Plan(cells=cells, runs=runs)


def shares_its_run(folder: Path, job: int) -> bool:
    """Whether the run of a job of the sweep in `folder` holds several cells."""
    try:
        plan = load_plan(folder)
    except ConfigError:
        return False
    return any(
        job in run.jobs and len(plan.cells_of(place)) > 1 for place, run in enumerate(plan.runs)
    )


def save_outcome(folder: Path, job: int, outcome: Mapping[str, Any]) -> None:
    """Notes how a job of the sweep in `folder` ended, or that it began: then `code` is None."""
    write_atomically(folder / JOBS / f"{job}.json", json.dumps(outcome, indent=1).encode())


def load_outcome(folder: Path, job: int) -> dict[str, Any] | None:
    """How a job ended; None where it has not begun."""
    return read_object(folder / JOBS / f"{job}.json") or None


def note_death(folder: Path, job: int, error: str) -> None:
    """Notes that a job ended without saying how."""
    known = load_outcome(folder, job) or {}
    if known.get("code") is None:
        save_outcome(folder, job, known | {"code": 1, "error": error})
