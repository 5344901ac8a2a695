"""The commands. `run` is Hydra's; the others compose the same configuration. Nothing here loads
torch before a model is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from editkit import __version__
from editkit.cli import probe, reports, stats, sweeps
from editkit.cli import run as application
from editkit.cli import train as training
from editkit.cli.arguments import UNPARSED, ConfigDir, Overrides, composed_or_explained
from editkit.config.compose import options
from editkit.errors import ConfigError

app = typer.Typer(
    name="editkit",
    help="Sequential-editing benchmarks: any editor, restraint, model and dataset, composed from configuration files.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(stats.app, name="stats")
app.add_typer(probe.app)
app.add_typer(reports.app)
app.add_typer(sweeps.app)
app.add_typer(training.app)


def main() -> None:
    """The entry point: the exit code is 2 for a mistake of the user's, which is told without a
    traceback.
    """
    application.make_importable(Path.cwd())
    try:
        app()
    except ConfigError as error:
        application.report(error)
        sys.exit(application.MISTAKE)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(f"editkit {__version__}")
        raise typer.Exit


@app.command(context_settings=UNPARSED, add_help_option=False)
def run(context: typer.Context) -> None:
    """Run an experiment: a Hydra application, `editkit run --help` lists its groups and values."""
    raise typer.Exit(application.run(context.args))


@app.command("ls")
def list_options(
    group: Annotated[str | None, typer.Argument(help="Only this group.")] = None,
    config_dir: ConfigDir = None,
) -> None:
    """List every option of every group; the defaults are marked."""
    from rich.console import Console
    from rich.table import Table

    found = list(options(config_dir))
    if group is not None and group not in (groups := sorted({option.group for option in found})):
        raise ConfigError(f"{group} is not a group. Groups: {', '.join(groups)}.")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(no_wrap=True)
    table.add_column()
    last = ""
    for option in found:
        if group in (None, option.group):
            if last and last != option.group:
                table.add_row()
            table.add_row(
                "" if option.group == last else option.group,
                option.name + (" *" if option.is_default else ""),
                option.about,
            )
            last = option.group
    console = Console()
    if not console.is_terminal:
        console.width = 240  # a line each, for grep
    console.print(table, highlight=False, markup=False)


@app.command()
def validate(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Compose and check a configuration, read its dataset and estimate its memory; no model is
    loaded.

    A GPU that this machine does not have is held against runtime.memory_gb alone.
    """
    from rich.console import Console
    from rich.table import Table

    from editkit.config.build import build
    from editkit.resources.estimate import free_bytes, here

    composed = composed_or_explained(overrides or [], config_dir)
    experiment = build(composed.config, choices=composed.choices)
    memory = here(experiment.demand, free_bytes=free_bytes(experiment.demand))
    problems = memory.problems() if memory is not None else []
    recipe = composed.config.get("recipe", {})
    schedule = experiment.schedule
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in (
        (
            "model",
            f"{experiment.model.label} ({experiment.model.id}, {experiment.model.dtype}, {experiment.runtime.device})",
        ),
        (
            "editor",
            f"{composed.choices['editor']}"
            + (f", numbers {recipe['provenance']}: {recipe['source']}" if recipe else ""),
        ),
        ("restraints", ", ".join(experiment.config["restraint"]) or "none"),
        (
            "dataset",
            f"{experiment.data.label}, {len(experiment.data.requests)} requests from {experiment.data.origin}",
        ),
        *((f"  {kind.replace('_', ' ')}", text) for kind, text in experiment.data.counts()),
        (
            "edits",
            f"{schedule.edits} in batches of {schedule.batch_size}, measured after {', '.join(map(str, schedule.milestones))}",
        ),
        ("folder", str(experiment.folder)),
        *(memory.rows() if memory is not None else [probe.UNKNOWN]),
    ):
        table.add_row(*row)
    console = Console()
    if not problems:
        console.print("[green]ok[/green]")
    console.print(table, highlight=False, markup=False)
    if problems:
        raise ConfigError(problems)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's folder, outputs/.../seed<k>.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    view: Annotated[
        str | None,
        typer.Option(help="A restraint on the total; without it the model as the edits left it."),
    ] = None,
) -> None:
    """Write a run's edited model as a Hugging Face folder."""
    from editkit.runner.export import export as write

    write(run, to, view=view)
    typer.echo(f"written: {to}")


@app.command("show")
def show_run(
    run: Annotated[Path, typer.Argument(help="A run's folder, outputs/.../seed<k>.")],
    protocol: Annotated[
        str | None, typer.Option(help="How edits are judged: probability or argmax.")
    ] = None,
) -> None:
    """Show a run's table from its files."""
    from rich.console import Console

    from editkit.report.show import show

    Console().print(show(run, protocol=protocol))


@app.command()
def bench(
    name: Annotated[
        str,
        typer.Argument(
            help="What to measure: telemetry, rome, memit, d4s, alphaedit, editing, moments, or all."
        ),
    ] = "all",
    shape: Annotated[
        str,
        typer.Option(
            help="Whose sizes, with random weights: tiny-gpt2, gpt2, gpt2-xl, llama3-8b..."
        ),
    ] = "gpt2",
    repeats: Annotated[
        int, typer.Option(help="How often each way is timed; the median counts.")
    ] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    layers: Annotated[
        int | None, typer.Option(help="A smaller depth than the model's.", show_default=False)
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Requests of the MEMIT batch that is compared with single ones.")
    ] = 32,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show which operations take our time.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="Where the results are written.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Time the plain way and ours side by side."""
    from rich.console import Console

    from editkit.bench import measurements, run_bench, table

    options = {
        "repeats": repeats,
        "device": device,
        "dtype": dtype,
        "layers": layers,
        "batch": batch,
        "profile": profile,
    }
    names = list(measurements()) if name == "all" else [name]
    Console().print(
        table([run_bench(each, shape, folder=folder, **options) for each in names]),
        highlight=False,
        markup=False,
    )
