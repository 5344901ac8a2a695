"""The runs below folders: a run is a folder that holds `steps.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from editkit.errors import ConfigError, message
from editkit.records.reader import RunRecords, load_run


def run_folders(folders: Iterable[Path]) -> tuple[Path, ...]:
    """Every run's folder at or below these, in the order of the names, each once. Raises
    ConfigError where there is none.
    """
    found: dict[Path, Path] = {}
    problems: list[str] = []
    for folder in folders:
        runs = (
            sorted(path.parent for path in folder.rglob("steps.jsonl")) if folder.is_dir() else []
        )
        if not runs:
            problem = "holds no run" if folder.is_dir() else "not a folder"
            problems.append(message(str(folder), problem, expected="folders with steps.jsonl"))
        found |= {run.resolve(): run for run in runs if run.resolve() not in found}
    if problems:
        raise ConfigError(problems)
    return tuple(found.values())


def load_runs(folders: Iterable[Path]) -> tuple[RunRecords, ...]:
    """All runs below these folders. Raises ConfigError with everything that cannot be read."""
    runs: list[RunRecords] = []
    problems: list[str] = []
    for folder in run_folders(folders):
        try:
            runs.append(load_run(folder))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return tuple(runs)
