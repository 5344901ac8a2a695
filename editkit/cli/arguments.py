"""Arguments that several commands share, and the console."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editkit.config.explain import composed as composed

if TYPE_CHECKING:
    from rich.console import Console

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Hydra overrides, as for `editkit run`: model=tiny-llama edits=50", show_default=False
    ),
]
ConfigDir = Annotated[
    Path | None,
    typer.Option(
        "--config-dir",
        help="Folder of your own options, with a subfolder per group.",
        exists=True,
    ),
]
# A sweep is recognised by its values, with or without the flag.
Multirun = Annotated[
    bool,
    typer.Option("--multirun", "-m", help="Accepted, so that a command of `run` can be checked."),
]
RunFolders = Annotated[
    list[Path], typer.Argument(help="Runs, or folders of runs: outputs/demo", show_default=False)
]
# Settings of a command that passes its arguments on to Hydra.
UNPARSED = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}


def console(*, width: int = 240) -> Console:
    """The console on stdout. If stdout is not a terminal, lines are not wrapped at 80 columns, so
    that grep finds whole rows.
    """
    from rich.console import Console

    shown = Console()
    if not shown.is_terminal:
        shown.width = width
    return shown
