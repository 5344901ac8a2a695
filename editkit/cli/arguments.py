"""Arguments that several commands share, the composition of their overrides, and the console."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from editkit.config.compose import Composed, compose, explain_composition_error, force_add
from editkit.errors import ConfigError

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


def composed(overrides: Sequence[str] | None, config_dir: Path | None) -> Composed:
    """The configuration that these overrides compose to.

    Raises:
        ConfigError: they cannot be composed.
    """
    overrides = overrides or []
    try:
        return compose(overrides, config_dir=config_dir)
    except composition_errors() as error:
        raise explained(error, overrides, config_dir) from None


def composition_errors() -> tuple[type[Exception], ...]:
    """The exceptions that an invalid override or configuration file raises."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return (ConfigError, HydraException, OmegaConfBaseException, yaml.YAMLError, OSError)


def explained(error: Exception, overrides: Sequence[str], config_dir: Path | None) -> ConfigError:
    """The error of a composition as a ConfigError.

    Hydra stops at the first unknown key and does not name the keys that exist. For such an error
    all problems of the configuration are collected instead.
    """
    if isinstance(error, ConfigError):
        return error
    if "Could not override" in str(error):
        from editkit.config.build import build

        try:
            forced = compose(force_add(overrides), config_dir=config_dir)
            build(forced.config, choices=forced.choices)
        except ConfigError as problems:
            return problems
        except composition_errors():
            pass  # Hydra's first error is reported below
    if explanation := explain_composition_error(error, overrides):
        return ConfigError(explanation)
    causes = [
        str(cause).partition("Config search path")[0].strip()
        for cause in (error, error.__cause__)
        if cause is not None
    ]
    return ConfigError("\n".join(filter(None, causes)) or type(error).__name__)


def console(*, width: int = 240) -> Console:
    """The console on stdout. If stdout is not a terminal, lines are not wrapped at 80 columns, so
    that grep finds whole rows.
    """
    from rich.console import Console

    shown = Console()
    if not shown.is_terminal:
        shown.width = width
    return shown
