"""`editkit collect`: the measurements of many runs as one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editkit.cli.arguments import RunFolders


def collect(
    folders: RunFolders,
    to: Annotated[Path, typer.Option(help="File to write: .parquet or .csv.")],
    every_step: Annotated[
        bool,
        typer.Option(
            "--every-step", help="Include weights and losses of every step, not of measured ones."
        ),
    ] = False,
) -> None:
    """Collect the measurements of many runs in one tidy table."""
    from editkit.records.find import load_runs
    from editkit.report.collect import collect as table_of
    from editkit.report.collect import save

    runs = load_runs(folders)
    table = table_of(runs, every_step=every_step)
    save(table, to)
    typer.echo(f"{len(table)} lines from {len(runs)} runs: {to}")
