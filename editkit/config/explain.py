"""The composition of overrides, with every error of the user as a ConfigError."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from editkit.config.compose import Composed, compose, explain_composition_error, force_add
from editkit.errors import ConfigError, message
from editkit.files import out_of_space_number


def composed(overrides: Sequence[str] | None, config_dir: Path | None) -> Composed:
    """The configuration that these overrides compose to.

    Raises:
        ConfigError: they cannot be composed.
    """
    overrides = overrides or []
    with explaining(overrides, config_dir):
        return compose(overrides, config_dir=config_dir)


@contextlib.contextmanager
def explaining(overrides: Sequence[str], config_dir: Path | None) -> Iterator[None]:
    """Raises every error of a composition as a ConfigError."""
    require_keys(overrides)
    try:
        yield
    except composition_errors() as error:
        raise explained(error, overrides, config_dir) from None


def require_keys(overrides: Sequence[str]) -> None:
    """Raises ConfigError for overrides without a key, of which Hydra makes a traceback."""
    problem, expected = "an override without a key", "key=value"
    if without := [override for override in overrides if override.startswith("=")]:
        raise ConfigError([message(each, problem, expected=expected) for each in without])


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
        from editkit.config.build import build  # slow to import, and rarely needed

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


@contextlib.contextmanager
def unwritable_is_invalid(folder: Path) -> Iterator[None]:
    """Raises ConfigError if the operating system refuses to write the files of a run."""
    try:
        yield
    except OSError as error:
        if (
            out_of_space_number(error)
            or error.filename is None
            or not (
                folder.absolute().is_relative_to(named := Path(error.filename).absolute())
                or folder in named.parents
            )
        ):
            raise
        raise ConfigError(
            message("paths.outputs", f"cannot write {error.filename} ({error.strerror})")
        ) from error
