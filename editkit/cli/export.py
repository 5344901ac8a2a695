"""`editkit export`: the edited model of a run for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

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
    form: Annotated[
        str,
        typer.Option(
            "--as",
            help="model: a Hugging Face folder. lora: an adapter for peft. delta: the factors of"
            " the sum of all updates.",
        ),
    ] = "model",
    rank: Annotated[
        int | None,
        typer.Option(
            help="Largest rank with --as lora or delta. By default the factors are exact.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write the edited model of a run as a Hugging Face folder, or its edits as factors."""
    from editkit.runner.export import export as write

    errors = write(run, to, view=view, form=cast(Any, form), rank=rank)
    typer.echo(f"written: {to}")
    if errors and max(errors.values()) > 1e-6:
        module, error = max(errors.items(), key=lambda item: item[1])
        typer.echo(f"relative error of the truncated edits: up to {error:.2g} ({module})")
