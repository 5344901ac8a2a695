"""`editkit status` and `editkit submit`: sweeps seen from outside, and left to a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editkit.cli import run as application
from editkit.cli.arguments import UNPARSED
from editkit.errors import ConfigError

app = typer.Typer()


@app.command()
def status(
    sweep: Annotated[
        Path | None,
        typer.Argument(
            help="A sweep's folder, outputs/multirun/<date>, or any folder of runs; without it the newest sweep."
        ),
    ] = None,
    outputs: Annotated[Path, typer.Option(help="Where the newest sweep is looked for.")] = Path(
        "outputs"
    ),
) -> None:
    """List a sweep's cells: done, running, failed, cut off or missing, with their last edit and
    error.
    """
    from rich.console import Console

    from editkit.sweeps import summary
    from editkit.sweeps.plan import CELLS, load_plan
    from editkit.sweeps.runs import plan_of_runs

    folder = sweep or newest(outputs)
    if not folder.is_dir():
        raise ConfigError(f"no sweep to look at: {folder} is not a folder.")
    plan = load_plan(folder) if (folder / CELLS).exists() else plan_of_runs(folder)
    statuses = summary.statuses_of(plan, folder)
    console = Console()
    if not console.is_terminal:
        console.width = 240  # a line each, for grep
    console.print(summary.table(plan, statuses), highlight=False, markup=False)
    console.print(
        f"{folder}: {summary.counts(plan, statuses)}", highlight=False, markup=False, soft_wrap=True
    )


def newest(outputs: Path) -> Path:
    """The sweep that was planned last. Raises ConfigError where there is none."""
    found = sorted(outputs.glob("multirun/*/cells.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"no sweep below {outputs / 'multirun'}: give a sweep's folder.")
    return found[-1].parent


@app.command(context_settings=UNPARSED, add_help_option=False)
def submit(context: typer.Context) -> None:
    """Run a sweep on Slurm: `editkit submit [--detach] sweep=restraints hydra/launcher=slurm_gpu`;
    --detach leaves the array behind.

    The same as `editkit run --multirun hydra/launcher=slurm`; another preset of Slurm's may be
    given.
    """
    arguments = list(context.args)
    if "--help" in arguments:
        typer.echo(f"Usage: editkit submit [--detach] [HYDRA OVERRIDES]\n\n{submit.__doc__}")
        return
    asked = [each for each in arguments if each not in ("--detach", "--multirun", "-m")]
    added = (
        []
        if any(each.startswith("hydra/launcher=") for each in asked)
        else ["hydra/launcher=slurm"]
    )
    added += ["hydra.launcher.detach=true"] if "--detach" in arguments else []
    # Hydra takes its overrides in one piece: these stand where the first of the others does.
    place = next(
        (place for place, each in enumerate(asked) if "=" in each and not each.startswith("-")),
        len(asked),
    )
    raise typer.Exit(application.run(["--multirun", *asked[:place], *added, *asked[place:]]))
