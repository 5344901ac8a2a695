"""The runs below folders: a run is a folder that holds `steps.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from editkit.errors import ConfigError, message
from editkit.records.reader import RunRecords, load_run


def run_folders(folders: Iterable[Path]) -> tuple[Path, ...]:
    """The folders of all runs at or below these, in the order of their names, without duplicates.

    Raises:
        ConfigError: a folder has no run below it.
    """
    by_path: dict[Path, Path] = {}
    problems: list[str] = []
    for folder in folders:
        paths = folder.rglob("steps.jsonl") if folder.is_dir() else ()
        runs = sorted(path.parent for path in paths)
        if not runs:
            problem = "holds no run" if folder.is_dir() else "not a folder"
            problems.append(message(str(folder), problem, expected="folders with steps.jsonl"))
        for run in runs:
            by_path.setdefault(run.resolve(), run)
    if problems:
        raise ConfigError(problems)
    return tuple(by_path.values())


def load_runs(folders: Iterable[Path]) -> tuple[RunRecords, ...]:
    """The records of all runs at or below these folders.

    Raises:
        ConfigError: with all problems of all runs.
    """
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
