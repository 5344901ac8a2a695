"""The runs below folders: a run is a folder that holds `steps.jsonl`. Where there is none, results
of other programs are foreign runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from editkit.errors import ConfigError, message
from editkit.records.foreign import FILES, foreign_runs, load_foreign
from editkit.records.reader import RunRecords, load_run
from editkit.records.writer import STEPS


def run_folders(folders: Iterable[Path]) -> tuple[Path, ...]:
    """The folders of all runs at or below these, in the order of their names, without duplicates.

    Raises:
        ConfigError: a folder has no run below it.
    """
    by_path: dict[Path, Path] = {}
    problems: list[str] = []
    for folder in folders:
        if not (runs := _runs_below(folder)):
            problems.append(_no_run(folder, "folders with steps.jsonl"))
        for run in runs:
            by_path.setdefault(run.resolve(), run)
    if problems:
        raise ConfigError(problems)
    return tuple(by_path.values())


def load(path: Path) -> RunRecords:
    """The records of one run, own or foreign.

    Raises:
        ConfigError: there is no run, or several foreign ones; or it cannot be read.
    """
    if (path / STEPS).exists() or not (found := foreign_runs(path)):
        return load_run(path)
    if len(found) > 1:
        names = ", ".join(str(each.relative_to(path)) for each in found[:8])
        problem, fix = f"{len(found)} foreign runs", "name one of them"
        raise ConfigError(message(str(path), problem, got=names, fix=fix))
    return load_foreign(found[0])


def load_runs(paths: Iterable[Path]) -> tuple[RunRecords, ...]:
    """The records of all runs at or below these folders; of a folder without runs, its foreign
    runs.

    Raises:
        ConfigError: with all problems of all runs.
    """
    readers: dict[Path, tuple[Path, Callable[[Path], RunRecords]]] = {}
    problems: list[str] = []
    for path in paths:
        own = _runs_below(path)
        found = own or foreign_runs(path)
        if not found:
            problems.append(_no_run(path, f"folders with steps.jsonl, or with {FILES}"))
        for run in found:
            readers.setdefault(run.resolve(), (run, load_run if own else load_foreign))
    if problems:
        raise ConfigError(problems)
    runs: list[RunRecords] = []
    for run, read in readers.values():
        try:
            runs.append(read(run))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return tuple(runs)


def _runs_below(folder: Path) -> list[Path]:
    paths = folder.rglob(STEPS) if folder.is_dir() else ()
    return sorted(path.parent for path in paths)


def _no_run(folder: Path, expected: str) -> str:
    problem = "holds no run" if folder.is_dir() else "not a folder"
    return message(str(folder), problem, expected=expected)
