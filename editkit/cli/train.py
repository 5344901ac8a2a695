"""`editkit train`: training of a hypernetwork."""

from __future__ import annotations

import typer

from editkit.cli.arguments import ConfigDir, Overrides, composed
from editkit.config.explain import unwritable_is_invalid


def train(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Train the hypernetwork of an editor: editkit train editor=mend model=tiny-gpt2 dataset=world.

    Re-running the same command resumes an interrupted training. The folder of the training contains
    the hypernetwork. A run loads it with editor.hypernetwork=<folder>.
    """
    from editkit.training.build import build_training

    chosen = composed(overrides, config_dir)
    training = build_training(chosen.config, choices=chosen.choices)
    from editkit.training.session import train as execute

    with unwritable_is_invalid(training.folder):
        code = execute(training)
    if code:
        raise typer.Exit(code)
    typer.echo(f"editor.hypernetwork={training.folder}")
