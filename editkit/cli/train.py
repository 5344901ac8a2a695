"""`editkit train`: the training of an editor that has to learn first."""

from __future__ import annotations

import typer

from editkit.cli import run as application
from editkit.cli.arguments import ConfigDir, Overrides, composed_or_explained

app = typer.Typer()


@app.command()
def train(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Train an editor's hypernetwork: editkit train editor=mend model=tiny-gpt2 dataset=world.

    Goes on where the same command was cut off. Its folder holds what a run's does, and the
    hypernetwork, which editor.hypernetwork of a run then names.
    """
    from editkit.training.build import build_training

    composed = composed_or_explained(overrides, config_dir)
    job = build_training(composed.config, choices=composed.choices)
    from editkit.training.session import train as execute

    with application.writing_below(job.folder):
        code = execute(job)
    if code:
        raise typer.Exit(code)
    typer.echo(f"editor.hypernetwork={job.folder}")
