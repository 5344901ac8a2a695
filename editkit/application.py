"""`editkit run`, the Hydra application: composes, builds, runs; one configuration or many.

Exit codes: 0 done, 1 an internal failure (with its traceback) or a collapsed run, 2 the user's mistake, 128 + n stopped by signal n.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from editkit.compose import ROOT, compose, conf_folder, with_every_key_added
from editkit.errors import ConfigError

OK, FAILURE, MISTAKE, SIGNAL = 0, 1, 2, 128


class JobFailed(Exception):
    """A job of a multirun did not end well; its reason has been shown. The other jobs go on."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run(arguments: Sequence[str]) -> int:
    """Runs what the arguments after `editkit run` ask for; the exit code. Of a multirun it is that of the first job that failed."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    codes: list[int] = []

    def job(config: Any) -> None:
        context = HydraConfig.get()
        if context.mode is RunMode.RUN:
            codes.append(attempt(config, context.runtime.choices, label=""))
            return
        code = attempt(config, context.runtime.choices, label=f"job {context.job.num} ({' '.join(context.overrides.task)})")
        if code > SIGNAL:
            raise SystemExit(code)  # whoever stops a job means the sweep
        if code != OK:
            raise JobFailed(code)

    application = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=ROOT)(job)
    try:
        with hydra_called_with(arguments):
            application()
    except JobFailed as failed:
        return failed.code
    except config_mistakes() as error:
        overrides, config_dir = given(arguments)
        report(explain(error, overrides, config_dir))
        return MISTAKE
    return codes[0] if codes else OK


def attempt(config: Any, choices: Mapping[str, Any], *, label: str) -> int:
    """Builds and runs one configuration; whatever goes wrong is shown and becomes an exit code."""
    from editkit.build import build

    make_importable(Path.cwd())  # again: a launcher may have put this job into another process
    try:
        experiment = build(config, choices=choices)
        from editkit import session

        with writing_below(experiment.folder):
            return session.run(experiment)
    except ConfigError as error:
        report(error, label=label)
        return MISTAKE
    except Exception:
        report_failure(label)
        return FAILURE


@contextlib.contextmanager
def writing_below(folder: Path) -> Iterator[None]:
    """Turns the system's refusal to write a run's own files into a ConfigError."""
    try:
        yield
    except OSError as error:
        if error.filename is None or not (
            folder.absolute().is_relative_to(named := Path(error.filename).absolute()) or folder in named.parents
        ):
            raise
        raise ConfigError(f"paths.outputs: {error.filename} cannot be written ({error.strerror}).") from error


def config_mistakes() -> tuple[type[Exception], ...]:
    """The exceptions of a composition that the user can mend."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return (ConfigError, HydraException, OmegaConfBaseException, yaml.YAMLError, OSError)


def explain(error: Exception, overrides: Sequence[str], config_dir: Path | None) -> ConfigError:
    """The mistake in our own words where we know better than Hydra, which names one misspelt key and not what there is instead."""
    if isinstance(error, ConfigError):
        return error
    if "Could not override" in str(error):
        from editkit.build import build

        try:
            composed = compose(with_every_key_added(overrides), config_dir=config_dir)
            build(composed.config, choices=composed.choices)
        except ConfigError as known:
            return known
        except config_mistakes():
            pass  # what Hydra said first stands
    causes = [str(each).partition("Config search path")[0].strip() for each in (error, error.__cause__) if each is not None]
    return ConfigError("\n".join(cause for cause in causes if cause) or type(error).__name__)


def given(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The overrides among Hydra's arguments, and the folder of --config-dir."""
    from hydra._internal.utils import get_args_parser

    parsed = get_args_parser().parse_args(list(arguments))
    return parsed.overrides, Path(parsed.config_dir) if parsed.config_dir else None


@contextlib.contextmanager
def hydra_called_with(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra reads its arguments from sys.argv, and hands exceptions on only when it is asked for full errors."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["editkit run", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def make_importable(folder: Path) -> None:
    """Lets `_target_: mine.Mine` find mine.py there; last in line, so that nothing installed is hidden."""
    if str(folder) not in sys.path and "" not in sys.path:
        sys.path.append(str(folder))


def report(error: ConfigError, *, label: str = "") -> None:
    """Shows a mistake on stderr, without a traceback."""
    from rich.console import Console
    from rich.text import Text

    lines = [f"ConfigError{' in ' + label if label else ''}: "]
    lines += (
        [error.problems[0]]
        if len(error.problems) == 1
        else [f"{len(error.problems)} problems", *(f"\n  - {each}" for each in error.problems)]
    )
    Console(stderr=True, soft_wrap=True).print(Text(lines[0], style="bold red") + Text("".join(lines[1:]), style="default"))


def report_failure(label: str) -> None:
    """Shows the exception that is being handled, with its traceback."""
    sys.stderr.write(f"{label or 'editkit'}: an internal failure\n{traceback.format_exc()}")
