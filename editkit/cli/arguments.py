"""What the commands that compose a configuration share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editkit.cli import run as application
from editkit.config.compose import Composed, compose

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Hydra overrides, as for `editkit run`: model=tiny-llama edits=50", show_default=False
    ),
]
# Of a command whose arguments are Hydra's.
UNPARSED = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "allow_interspersed_args": False,
    "help_option_names": [],
}
ConfigDir = Annotated[
    Path | None,
    typer.Option(
        "--config-dir",
        help="A folder of your own options, laid out as the groups are.",
        exists=True,
    ),
]


def composed_or_explained(overrides: list[str] | None, config_dir: Path | None) -> Composed:
    """Raises ConfigError for whatever keeps these overrides from being composed."""
    try:
        return compose(overrides or [], config_dir=config_dir)
    except application.config_mistakes() as error:
        raise application.explain(error, overrides or [], config_dir) from None
