"""`editkit collect`, `report`, `push` and `dashboard`: what is done with runs that are there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from editkit.errors import ConfigError

app = typer.Typer()

Folders = Annotated[
    list[Path], typer.Argument(help="Runs, or folders of runs: outputs/demo", show_default=False)
]
Project = Annotated[
    str | None,
    typer.Option(
        help="The W&B project; as the run says, or $WANDB_PROJECT, or editkit.", show_default=False
    ),
]
Entity = Annotated[
    str | None,
    typer.Option(
        help="The W&B person or team; as the run says, or $WANDB_ENTITY.", show_default=False
    ),
]


@app.command()
def collect(
    folders: Folders,
    to: Annotated[Path, typer.Option(help="The file to write: .parquet or .csv.")],
    every_step: Annotated[
        bool,
        typer.Option(
            "--every-step", help="Weights and losses of every step, not of measured ones only."
        ),
    ] = False,
) -> None:
    """Gather the measurements of many runs in one tidy table."""
    from editkit.records.find import load_runs
    from editkit.report.collect import collect as gather
    from editkit.report.collect import save

    runs = load_runs(folders)
    table = gather(runs, every_step=every_step)
    save(table, to)
    typer.echo(f"{len(table)} lines from {len(runs)} runs: {to}")


@app.command()
def report(
    folders: Folders,
    to: Annotated[Path, typer.Option(help="The folder to write.")] = Path("report"),
    title: Annotated[str | None, typer.Option(help="Of the page.", show_default=False)] = None,
    published: Annotated[
        list[Path] | None,
        typer.Option(
            help="Published numbers to set beside: files like experiments/*/published.csv.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a page that compares runs, figures (PNG and PDF) and tables (LaTeX and Markdown)."""
    from editkit.report.write import report as write

    written = write(folders, to, title=title, published=published)
    typer.echo(
        f"{written.page} ({written.page.stat().st_size / 1e6:.1f} MB), {len(written.figures)} figures, {len(written.tables)} tables"
    )


@app.command()
def push(
    folders: Folders,
    project: Project = None,
    entity: Entity = None,
    mode: Annotated[
        str,
        typer.Option(help="online, or offline: files below the run's folder, for `wandb sync`."),
    ] = "online",
    artifacts: Annotated[
        bool,
        typer.Option("--artifacts", help="The resolved configuration and the edited delta too."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Also what is noted as sent.")] = False,
) -> None:
    """Send the files of runs to W&B, which repairs what was offline or cut off; what is there
    already is not sent again.
    """
    from editkit.records.find import run_folders
    from editkit.wandb.client import Target, checked, read_marker
    from editkit.wandb.push import push as send

    if mode not in ("online", "offline"):
        raise ConfigError(f"--mode: {mode} was given; online or offline.")
    where: Literal["online", "offline"] = "online" if mode == "online" else "offline"
    problems: list[str] = []
    for folder in run_folders(folders):
        marker = read_marker(folder)
        target = Target(
            mode=where,
            project=project
            or marker.get("project")
            or os.environ.get("WANDB_PROJECT")
            or "editkit",
            entity=entity or marker.get("entity") or os.environ.get("WANDB_ENTITY"),
            artifacts=artifacts,
        )
        checked(target)
        try:
            typer.echo(f"{folder}: {send(folder, target, force=force)}")
        except ConfigError as error:
            problems += error.problems
        except Exception as error:  # one run that cannot be sent must not keep the others
            problems.append(
                f"{folder}: not sent ({type(error).__name__}: {' '.join(str(error).split())})"
            )
    if problems:
        raise ConfigError(problems)


@app.command()
def dashboard(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(help="Runs whose metrics get panels; none: all that are known."),
    ] = None,
    to: Annotated[Path, typer.Option(help="The file to write.")] = Path("dashboard.json"),
    project: Annotated[
        str, typer.Option(help="The W&B project.", envvar="WANDB_PROJECT")
    ] = "editkit",
    entity: Annotated[
        str, typer.Option(help="The W&B person or team.", envvar="WANDB_ENTITY")
    ] = "",
    name: Annotated[str, typer.Option(help="Of the workspace.")] = "editkit: the papers' panels",
    save: Annotated[
        bool, typer.Option("--save", help="Also save it on W&B (needs --entity and a key).")
    ] = False,
) -> None:
    """Write a W&B workspace with the papers' panels: weights, editing metrics and tasks against
    edits, grouped by restraint.
    """
    from editkit.records.find import load_runs
    from editkit.wandb.dashboard import workspace, write

    if save and not entity:
        raise ConfigError("--save needs --entity: the W&B person or team that owns the project.")
    made = workspace(load_runs(folders or []), project=project, entity=entity, name=name)
    write(made, to)
    typer.echo(f"written: {to}")
    if save:
        made.save()
        typer.echo(f"saved: {made.url}")
