"""`editkit export`: the edited model of a run for other programs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from editkit.errors import ConfigError, message


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run: outputs/.../seed<k>.")],
    to: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write. It must be new or empty. Not needed with --push.",
            show_default=False,
        ),
    ] = None,
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
    push: Annotated[
        str | None,
        typer.Option(
            help="Also send the folder to this model repository of the Hugging Face hub:"
            " owner/name.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="With --push: show files, sizes and card. Send nothing."),
    ] = False,
    public: Annotated[
        bool, typer.Option("--public", help="With --push: a new repository is public, not private.")
    ] = False,
) -> None:
    """Write the edited model of a run as a Hugging Face folder, or its edits as factors."""
    from editkit.runner.hub import Repository, listing

    repository = None if push is None else Repository(name=push, is_public=public)
    _check(to, repository, dry_run=dry_run, public=public)
    if repository is not None and not dry_run:
        repository.require_login()
    with tempfile.TemporaryDirectory() as scratch:
        place = to or Path(scratch) / "export"
        _write(run, place, view=view, form=form, rank=rank)
        if to is not None:
            typer.echo(f"written: {to}")
        if repository is None:
            return
        if dry_run:
            typer.echo(f"dry run, nothing was sent to {repository.name}:")
            for line in listing(place):
                typer.echo(line)
            return
        typer.echo(f"sent: {repository.send(place, about=f'editkit export of {run.name}')}")


def _check(to: Path | None, repository: Any, *, dry_run: bool, public: bool) -> None:
    """Raises ConfigError for options that cannot go together, before the model is loaded."""
    problems = []
    if repository is not None:
        problems += repository.problems()
    else:
        if to is None:
            fix = "name a new folder with --to, or a repository with --push"
            problems.append(message("--to", "is missing", fix=fix))
        for flag, is_set in (("--dry-run", dry_run), ("--public", public)):
            if is_set:
                problems.append(message(flag, "needs --push", fix="add --push owner/name"))
    if problems:
        raise ConfigError(problems)


def _write(run: Path, to: Path, *, view: str | None, form: str, rank: int | None) -> None:
    from editkit.runner.export import export as write

    errors = write(run, to, view=view, form=cast(Any, form), rank=rank)
    if errors and max(errors.values()) > 1e-6:
        module, error = max(errors.items(), key=lambda item: item[1])
        typer.echo(f"relative error of the truncated edits: up to {error:.2g} ({module})")
