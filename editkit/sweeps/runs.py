"""Runs that no sweep planned: all runs below a folder, as a plan."""

from __future__ import annotations

from pathlib import Path

import yaml

from editkit.errors import ConfigError, message
from editkit.files import LOCK
from editkit.records.writer import STEPS
from editkit.runner.folder import CONFIG
from editkit.sweeps.plan import Cell, Plan, Run


def plan_of_runs(folder: Path) -> Plan:
    """A plan with a cell for every run below a folder, named after the folder of the run.

    Raises:
        ConfigError: there is no run below the folder.
    """
    paths = sorted(
        {
            path.parent
            for name in (LOCK, STEPS)
            for path in folder.rglob(name)
            if path.parent.name.startswith("seed")
        }
    )
    if not paths:
        expected = "cells.json of a sweep, or folders of runs"
        raise ConfigError(message(str(folder), "contains no runs", expected=expected))
    cells, runs = [], []
    for number, path in enumerate(paths):
        edits, batch_size = _size(path)
        name = (str(path.relative_to(folder)),)
        cells.append(
            Cell(number=number, overrides=name, own=path, run=number, views=(), problem=None)
        )
        runs.append(Run(overrides=name, folder=path, edits=edits, batch_size=batch_size))
    return Plan(cells=tuple(cells), runs=tuple(runs))


def _size(folder: Path) -> tuple[int, int]:
    """Edits and batch size. Zero edits if the run ended before it wrote its configuration."""
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
        return int(config["edits"]), int(config["batch_size"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return 0, 1
