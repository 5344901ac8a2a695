"""Runs without a plan: whatever lies below a folder."""

from __future__ import annotations

from pathlib import Path

import yaml

from editkit.errors import ConfigError
from editkit.files import LOCK
from editkit.records.writer import STEPS
from editkit.runner.session import CONFIG
from editkit.sweeps.plan import Cell, Plan, Run


def plan_of_runs(folder: Path) -> Plan:
    """Every run below a folder as a cell of its own, called by its folder. Raises ConfigError where
    there is none.
    """
    found = sorted(
        {
            path.parent
            for name in (LOCK, STEPS)
            for path in folder.rglob(name)
            if path.parent.name.startswith("seed")
        }
    )
    if not found:
        raise ConfigError(
            f"no runs to look at: {folder} holds neither a sweep's cells.json nor a run."
        )
    cells, runs = [], []
    for number, path in enumerate(found):
        edits, batch_size = _size(path)
        text = (str(path.relative_to(folder)),)
        cells.append(
            Cell(number=number, overrides=text, own=path, run=number, views=(), problem=None)
        )
        runs.append(Run(overrides=text, folder=path, edits=edits, batch_size=batch_size))
    return Plan(cells=tuple(cells), runs=tuple(runs))


def _size(folder: Path) -> tuple[int, int]:
    """Edits and batch size; zero edits where the run did not come so far as to write its
    configuration.
    """
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
        return int(config["edits"]), int(config["batch_size"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return 0, 1
