"""`editkit run`, the Hydra application: composes, builds, runs; one configuration or many.

Exit codes: 0 done, 1 an internal failure (with its traceback) or a collapsed run, 2 the user's
mistake, 3 another process has the run, 128 + n stopped by signal n.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.config.compose import ROOT, compose, conf_folder, explain_composition_error, force_add
from editkit.errors import ConfigError, report

OK, FAILURE, MISTAKE, BUSY, SIGNAL = 0, 1, 2, 3, 128
COMPONENTS = (
    "model",
    "editor",
    "restraint",
    "dataset",
    "suite",
    "evaluation",
    "stats",
    "tracker",
)  # groups whose options differ in their keys


class JobFailed(Exception):
    """A job of a multirun did not end well; its reason has been shown. The other jobs go on."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run(arguments: Sequence[str]) -> int:
    """Runs what the arguments after `editkit run` ask for; the exit code. Of a multirun it is that
    of the first cell that failed.
    """
    import hydra

    from editkit.sweeps.sweeper import SweepEnded

    application = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=ROOT)(
        job
    )
    try:
        with hydra_called_with(left_to_the_cells(arguments)):
            application()
    except (JobFailed, SweepEnded) as ended:
        return ended.code
    except SystemExit as left:
        return int(left.code or OK)
    except config_mistakes() as error:
        overrides, config_dir = given(arguments)
        report(explain(error, overrides, config_dir))
        return MISTAKE
    return OK


def left_to_the_cells(arguments: Sequence[str]) -> list[str]:
    """The arguments of a multirun with the values of components as sweeps over one value:
    `restraint.prune.alpha=choice(1.6)`.

    Hydra composes what is common to all cells first, and there a swept group has its default still,
    which need not have that key.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType

    asked = given(arguments)[0]
    if not {"--multirun", "-m"} & set(arguments) and not any(
        each.startswith("sweep=") for each in asked
    ):
        return list(arguments)
    parsed = dict(zip(asked, OverridesParser.create().parse_overrides(asked), strict=True))
    single = {
        line: f"{line.partition('=')[0]}=choice({line.partition('=')[2]})"
        for line, each in parsed.items()
        if each.type is OverrideType.CHANGE
        and not each.is_sweep_override()
        and each.key_or_group.partition(".")[0] in COMPONENTS
        if "." in each.key_or_group
        and each.value()
        is not None  # a choice of nothing is no choice to Hydra; null goes the plain way
    }
    return [single.get(each, each) for each in arguments]


def job(config: Any) -> None:
    """What Hydra runs, in whatever process its launcher chose: leaves with the exit code, or raises
    JobFailed in a multirun.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from editkit.sweeps.plan import CELLS, save_outcome, shares_its_run

    context = HydraConfig.get()
    choices = context.runtime.choices
    if context.mode is RunMode.RUN:
        raise SystemExit(attempt(config, choices).code)
    folder = Path(context.sweep.dir)
    is_planned, started = (folder / CELLS).exists(), time.time()
    outcome = {"code": None, "error": None, "host": platform.node(), "pid": os.getpid()}
    if is_planned:
        save_outcome(folder, context.job.num, outcome)
    ended = attempt(
        config,
        choices,
        label=f"job {context.job.num} ({' '.join(context.overrides.task)})",
        is_cell=True,
        # A waiting sweeper takes cells that share this run apart, and each says what is wrong with
        # it.
        is_tried_apart=is_planned
        and not context.launcher.get("detach")
        and shares_its_run(folder, context.job.num),
    )
    if is_planned:
        where = os.path.relpath(ended.folder, folder) if ended.folder else None
        facts = {
            "code": ended.code,
            "error": ended.error,
            "folder": where,
            "seconds": round(time.time() - started, 3),
        }
        save_outcome(folder, context.job.num, outcome | facts)
    if ended.code > SIGNAL:
        raise SystemExit(ended.code)  # whoever stops a job means the sweep
    if ended.code != OK:
        raise JobFailed(ended.code)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job ended: its exit code, what went wrong on one line, and the run's folder where it
    came so far.
    """

    code: int
    error: str | None = None
    folder: Path | None = None


def attempt(
    config: Any,
    choices: Mapping[str, Any],
    *,
    label: str = "",
    is_cell: bool = False,
    is_tried_apart: bool = False,
) -> Ended:
    """Builds and runs one configuration; whatever goes wrong is shown and becomes an exit code.

    `is_tried_apart`: a mistake is not shown, since the parts of this run are tried next.
    """
    from editkit.config.build import build
    from editkit.runner.lock import Busy

    make_importable(Path.cwd())  # again: a launcher may have put this job into another process
    folder = None
    try:
        experiment = build(config, choices=choices)
        from editkit.runner import session

        folder = experiment.folder
        with writing_below(folder):
            return Ended(
                code=session.run(experiment, leave_failed=is_cell and not experiment.retry_failed),
                folder=folder,
            )
    except ConfigError as error:
        is_busy = isinstance(error, Busy)
        if is_busy or not is_tried_apart:
            report(error, label=label)
        return Ended(
            code=BUSY if is_busy else MISTAKE, error=" ".join(str(error).split()), folder=folder
        )
    except Exception as error:
        report_failure(label)
        return Ended(
            code=FAILURE, error=" ".join(f"{type(error).__name__}: {error}".split()), folder=folder
        )


@contextlib.contextmanager
def writing_below(folder: Path) -> Iterator[None]:
    """Turns the system's refusal to write a run's own files into a ConfigError."""
    try:
        yield
    except OSError as error:
        if error.filename is None or not (
            folder.absolute().is_relative_to(named := Path(error.filename).absolute())
            or folder in named.parents
        ):
            raise
        raise ConfigError(
            f"paths.outputs: {error.filename} cannot be written ({error.strerror})."
        ) from error


def config_mistakes() -> tuple[type[Exception], ...]:
    """The exceptions of a composition that the user can mend."""
    import yaml
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return (ConfigError, HydraException, OmegaConfBaseException, yaml.YAMLError, OSError)


def explain(error: Exception, overrides: Sequence[str], config_dir: Path | None) -> ConfigError:
    """The mistake in our own words where we know better than Hydra, which names one misspelt key
    and not what there is instead.
    """
    if isinstance(error, ConfigError):
        return error
    if "Could not override" in str(error):
        from editkit.config.build import build

        try:
            composed = compose(force_add(overrides), config_dir=config_dir)
            build(composed.config, choices=composed.choices)
        except ConfigError as known:
            return known
        except config_mistakes():
            pass  # what Hydra said first stands
    if own := explain_composition_error(error, overrides):
        return ConfigError(own)
    causes = [
        str(each).partition("Config search path")[0].strip()
        for each in (error, error.__cause__)
        if each is not None
    ]
    return ConfigError("\n".join(cause for cause in causes if cause) or type(error).__name__)


def given(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The overrides among Hydra's arguments, and the folder of --config-dir."""
    from hydra._internal.utils import get_args_parser

    parsed = get_args_parser().parse_args(list(arguments))
    return parsed.overrides, Path(parsed.config_dir) if parsed.config_dir else None


@contextlib.contextmanager
def hydra_called_with(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra reads its arguments from sys.argv, and hands exceptions on only when it is asked for
    full errors.
    """
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
    """Lets `_target_: mine.Mine` find mine.py there; last in line, so that nothing installed is
    hidden.
    """
    if str(folder) not in sys.path and "" not in sys.path:
        sys.path.append(str(folder))


def report_failure(label: str) -> None:
    """Shows the exception that is being handled, with its traceback."""
    sys.stderr.write(f"{label or 'editkit'}: an internal failure\n{traceback.format_exc()}")
