"""Makes an analysis of a run and writes it into the run's folder: `analysis/<name>-<view>.json`,
and the figure beside it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from editkit.analysis.base import AbstractAnalysis, Table, open_run
from editkit.analysis.circuit import Circuit
from editkit.analysis.failures import Failures
from editkit.analysis.influence import Influence
from editkit.analysis.lens import Lens
from editkit.analysis.objectives import Objectives
from editkit.analysis.recall import Recall
from editkit.analysis.update import Update
from editkit.errors import ConfigError, message
from editkit.files import file_name, write_atomically
from editkit.report.analyses import FOLDER
from editkit.report.figures.print_sheets import save

ANALYSES: dict[str, type[AbstractAnalysis]] = {
    kind.name: kind for kind in (Lens, Update, Failures, Recall, Circuit, Influence, Objectives)
}


def analyse(
    run: Path,
    what: str,
    *,
    view: str | None = None,
    requests: int = 50,
    options: Mapping[str, object] | None = None,
) -> tuple[Path, Sequence[Table]]:
    """Makes the analysis `what` of the run's last checkpoint.

    Args:
        view: None for the model as the run left it, or the name of a view.
        requests: at most so many of the first edits.
        options: of the analysis, such as the edges of a circuit.

    Returns:
        The file with the results, and the tables.

    Raises:
        ConfigError: there is no such analysis; the run or its data cannot be read; the analysis
            cannot be made of this run.
    """
    if what not in ANALYSES:
        expected = f"one of {', '.join(ANALYSES)}"
        raise ConfigError(message("analysis", "unknown", got=what, expected=expected))
    kind, given = ANALYSES[what], dict(options or {})
    known = [field.name for field in dataclasses.fields(kind)] if given else []
    if unknown := [name for name in given if name not in known]:
        expected = f"one of {', '.join(known)}" if known else "no options"
        raise ConfigError(message(f"--{unknown[0]}", f"no option of {what}", expected=expected))
    analysis = kind(**given)
    subject = open_run(run, view=view, requests=requests)
    if problems := analysis.problems(subject):
        raise ConfigError(problems)
    results = analysis.measure(subject)
    tables = analysis.tables(results)
    about: dict[str, Any] = {
        "analysis": what,
        "run": run.name,
        "config_hash": run.resolve().parent.name,
        "step": subject.state.step,
        "view": subject.view,
        "requests": [request.id for request in subject.requests],
        "results": results,
        "tables": [dataclasses.asdict(table) for table in tables],
    }
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    name = file_name(f"{what}-{subject.view}")
    path = folder / f"{name}.json"
    write_atomically(path, json.dumps(about).encode())
    figure = analysis.draw(results)
    if figure is not None:
        save(figure, folder, name)
    return path, tables
