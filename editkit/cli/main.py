"""The `editkit` command: its entry point and the list of its commands.

`run` is a Hydra application; the other commands compose the same configuration. Nothing here loads
torch before a model is needed.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Annotated

import typer

from editkit import __version__
from editkit.cli import (
    analyse,
    bench,
    certify,
    collect,
    evaluate,
    export,
    ledger,
    ls,
    probe,
    pull,
    report,
    run,
    show,
    stats,
    status,
    submit,
    train,
    tune,
    validate,
    wandb,
)
from editkit.cli.arguments import UNPARSED
from editkit.errors import report as show_error
from editkit.files import as_invalid
from editkit.lazy import wait_briefly

app = typer.Typer(
    name="editkit",
    help="Sequential knowledge-editing benchmarks for language models. Editor, restraint, model and"
    " dataset are chosen from configuration files.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """The entry point. Invalid input is reported without a traceback; the exit code is then 2. A
    full disk is reported in the same way, with exit code 4.
    """
    run.make_importable(Path.cwd())
    wait_briefly()
    try:
        app()
    except Exception as error:
        if (invalid := as_invalid(error)) is None:
            raise
        show_error(invalid)
        sys.exit(invalid.exit_code)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"editkit {__version__}")
        raise typer.Exit


def run_command(context: typer.Context) -> None:
    """Run an experiment or a sweep. `editkit run --help` lists all groups, options and values."""
    raise typer.Exit(run.run(context.args))


def evaluate_command(context: typer.Context) -> None:
    """Measure a model that somebody else edited: model=<edited> base=<original>.

    The command takes the overrides of `editkit run`, except those of the editor. It writes the same
    files: all protocols, locality against the base, and the weights that differ. base.<option> sets
    the options of both models.
    """
    raise typer.Exit(evaluate.evaluate(context.args))


PREPARE, EXPERIMENTS, RESULTS, SPEED = "Prepare", "Experiments", "Results", "Speed of editkit"
hydra_command = functools.partial(
    app.command, context_settings=UNPARSED, add_help_option=False, rich_help_panel=EXPERIMENTS
)

hydra_command("run")(run_command)
app.command(
    "evaluate",
    context_settings=UNPARSED | {"help_option_names": ["--help"]},
    rich_help_panel=EXPERIMENTS,
)(evaluate_command)
hydra_command("submit")(submit.submit)
app.command("status", rich_help_panel=EXPERIMENTS)(status.status)
app.command("train", rich_help_panel=EXPERIMENTS)(train.train)
app.command("tune", rich_help_panel=EXPERIMENTS)(tune.tune)

app.command("ls", rich_help_panel=PREPARE)(ls.list_options)
app.command("validate", rich_help_panel=PREPARE)(validate.validate)
app.command("probe", rich_help_panel=PREPARE)(probe.probe)
app.command("pull", rich_help_panel=PREPARE)(pull.pull)
app.command("share", rich_help_panel=PREPARE)(pull.share)
app.add_typer(stats.app, name="stats", rich_help_panel=PREPARE)

app.command("show", rich_help_panel=RESULTS)(show.show)
app.command("report", rich_help_panel=RESULTS)(report.report)
app.command("analyse", rich_help_panel=RESULTS)(analyse.analyse)
app.command("collect", rich_help_panel=RESULTS)(collect.collect)
app.command("export", rich_help_panel=RESULTS)(export.export)
app.command("certify", rich_help_panel=RESULTS)(certify.certify)
app.command("verify", rich_help_panel=RESULTS)(certify.verify)
app.add_typer(ledger.app, name="ledger", rich_help_panel=RESULTS)
app.command("push", rich_help_panel=RESULTS)(wandb.push)
app.command("dashboard", rich_help_panel=RESULTS)(wandb.dashboard)

app.command("bench", rich_help_panel=SPEED)(bench.bench)
