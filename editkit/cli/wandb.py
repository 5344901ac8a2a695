"""`editkit push` and `editkit dashboard`: runs on Weights & Biases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from editkit.cli.arguments import RunFolders
from editkit.errors import ConfigError, message


def push(
    folders: RunFolders,
    project: Annotated[
        str | None,
        typer.Option(
            help="W&B project. By default that of the run, then $WANDB_PROJECT, then editkit.",
            show_default=False,
        ),
    ] = None,
    entity: Annotated[
        str | None,
        typer.Option(
            help="W&B user or team. By default that of the run, then $WANDB_ENTITY.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="online, or offline: write files below the folder of the run, for `wandb sync`."
        ),
    ] = "online",
    artifacts: Annotated[
        bool,
        typer.Option(
            "--artifacts", help="Also upload the resolved configuration and the edited weights."
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Also upload what is recorded as uploaded.")
    ] = False,
) -> None:
    """Upload runs to W&B.

    Runs that were offline or interrupted are completed. What is already there is not uploaded
    again.
    """
    from editkit.records.find import run_folders
    from editkit.wandb.client import Target, checked, read_marker
    from editkit.wandb.push import push as upload

    if mode not in ("online", "offline"):
        expected = "online or offline"
        raise ConfigError(message("--mode", "unknown mode", got=mode, expected=expected))
    checked_mode: Literal["online", "offline"] = "online" if mode == "online" else "offline"
    problems: list[str] = []
    for folder in run_folders(folders):
        marker = read_marker(folder)
        target = Target(
            mode=checked_mode,
            project=project
            or marker.get("project")
            or os.environ.get("WANDB_PROJECT")
            or "editkit",
            entity=entity or marker.get("entity") or os.environ.get("WANDB_ENTITY"),
            artifacts=artifacts,
        )
        checked(target)
        try:
            typer.echo(f"{folder}: {upload(folder, target, force=force)}")
        except ConfigError as error:
            problems += error.problems
        except Exception as error:  # the other runs are uploaded all the same
            cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
            problems.append(message(str(folder), f"not uploaded ({cause})"))
    if problems:
        raise ConfigError(problems)


def dashboard(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Runs whose metrics get panels. By default all known metrics do."),
    ] = None,
    to: Annotated[Path, typer.Option(help="File to write.")] = Path("dashboard.json"),
    project: Annotated[str, typer.Option(help="W&B project.", envvar="WANDB_PROJECT")] = "editkit",
    entity: Annotated[str, typer.Option(help="W&B user or team.", envvar="WANDB_ENTITY")] = "",
    name: Annotated[
        str, typer.Option(help="Name of the workspace.")
    ] = "editkit: the papers' panels",
    save: Annotated[
        bool, typer.Option("--save", help="Also save it on W&B (needs --entity and a key).")
    ] = False,
) -> None:
    """Write a W&B workspace with the panels of the papers.

    Weights, editing metrics and tasks are shown against edits, grouped by restraint.
    """
    from editkit.records.find import load_runs
    from editkit.wandb.dashboard import workspace, write

    if save and not entity:
        fix = "set --entity to the W&B user or team that owns the project"
        raise ConfigError(message("--save", "needs --entity", fix=fix))
    made = workspace(load_runs(folders or []), project=project, entity=entity, name=name)
    write(made, to)
    typer.echo(f"written: {to}")
    if save:
        made.save()  # type: ignore[no-untyped-call]
        typer.echo(f"saved: {made.url}")
