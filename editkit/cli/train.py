"""`editkit train`: training of a hypernetwork, or of a pair of models."""

from __future__ import annotations

import typer

from editkit.cli.arguments import ConfigDir, Overrides, composed
from editkit.config.explain import unwritable_is_invalid


def train(overrides: Overrides = None, config_dir: ConfigDir = None) -> None:
    """Train what an editor needs: editkit train editor=mend model=tiny-gpt2 dataset=world.

    Re-running the same command resumes an interrupted training. The folder of the training contains
    MEND's hypernetwork or SERAC's pair of models. A run loads it with editor.hypernetwork=<folder>
    or editor.pair=<folder>.
    """
    from editkit.training.build import build_training

    chosen = composed(overrides, config_dir)
    training = build_training(chosen.config, choices=chosen.choices)
    from editkit.training.session import train as execute

    with unwritable_is_invalid(training.folder):
        code = execute(training)
    if code:
        raise typer.Exit(code)
    typer.echo(f"editor.{training.kind.key}={training.folder}")
