"""`editkit status`: the state of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editkit.cli.arguments import console
from editkit.errors import ConfigError, message


def status(
    sweep: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of a sweep, outputs/multirun/<date>, or any folder of runs. By default the"
            " newest sweep."
        ),
    ] = None,
    outputs: Annotated[
        Path, typer.Option(help="Folder in which the newest sweep is searched.")
    ] = Path("outputs"),
) -> None:
    """Show the state of a sweep, cell by cell.

    A cell is done, running, failed, interrupted or missing. Its last edit and its error are listed.
    """
    from editkit.sweeps import summary
    from editkit.sweeps.plan import CELLS, load_plan
    from editkit.sweeps.runs import plan_of_runs

    folder = sweep or newest(outputs)
    if not folder.is_dir():
        raise ConfigError(message(str(folder), "not a folder", expected="a sweep or runs"))
    plan = load_plan(folder) if (folder / CELLS).exists() else plan_of_runs(folder)
    statuses = summary.statuses_of(plan, folder)
    shown = console()
    shown.print(summary.table(plan, statuses), highlight=False, markup=False)
    line = f"{folder}: {summary.counts(plan, statuses)}"
    shown.print(line, highlight=False, markup=False, soft_wrap=True)


def newest(outputs: Path) -> Path:
    """The folder of the newest sweep.

    Raises:
        ConfigError: there is no sweep.
    """
    plans = sorted(outputs.glob("multirun/*/cells.json"), key=lambda path: path.stat().st_mtime)
    if not plans:
        fix = "name the folder of a sweep"
        raise ConfigError(message(str(outputs / "multirun"), "contains no sweep", fix=fix))
    return plans[-1].parent
