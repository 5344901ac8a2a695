"""`editkit submit`: a sweep on Slurm."""

from __future__ import annotations

import inspect

import typer

from editkit.cli.run import run


def submit(context: typer.Context) -> None:
    """Run a sweep on Slurm: editkit submit [--detach] sweep=restraints hydra/launcher=slurm_gpu.

    This is `editkit run --multirun hydra/launcher=slurm`, unless another Slurm preset is chosen.
    With --detach the command returns after the array is submitted.
    """
    arguments = list(context.args)
    if "--help" in arguments:
        usage = "Usage: editkit submit [--detach] [HYDRA OVERRIDES]"
        typer.echo(f"{usage}\n\n{inspect.cleandoc(submit.__doc__ or '')}")
        return
    own = [argument for argument in arguments if argument not in ("--detach", "--multirun", "-m")]
    has_launcher = any(argument.startswith("hydra/launcher=") for argument in own)
    added = [] if has_launcher else ["hydra/launcher=slurm"]
    added += ["hydra.launcher.detach=true"] if "--detach" in arguments else []
    # Hydra expects its overrides in one block: these are inserted before the first of the others.
    first = next(
        (
            index
            for index, argument in enumerate(own)
            if "=" in argument and not argument.startswith("-")
        ),
        len(own),
    )
    raise typer.Exit(run(["--multirun", *own[:first], *added, *own[first:]]))
