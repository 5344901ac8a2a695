"""`editkit export`: the edited model of a run for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run: outputs/.../seed<k>.")],
    to: Annotated[Path, typer.Option(help="Folder to write. It must be new or empty.")],
    view: Annotated[
        str | None,
        typer.Option(
            help="Name of a restraint on the total. By default the model is written as the run"
            " left it."
        ),
    ] = None,
) -> None:
    """Write the edited model of a run as a Hugging Face folder."""
    from editkit.runner.export import export as write

    write(run, to, view=view)
    typer.echo(f"written: {to}")
