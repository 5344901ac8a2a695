"""`editkit run`, the Hydra application: it composes, builds and runs one configuration or a sweep.

Exit codes: 0 done; 1 an internal failure (with its traceback) or a collapsed run; 2 invalid command
or data; 3 another process is writing the run; 4 the disk is full; 128 + n stopped by signal n.
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

from editkit.config.compose import ROOT, conf_folder, stacked_trackers
from editkit.config.explain import (
    composition_errors,
    explained,
    require_keys,
    unwritable_is_invalid,
)
from editkit.errors import report
from editkit.files import as_invalid
from editkit.sweeps.plan import (
    CELLS,
    FAILURE,
    INVALID,
    OK,
    STOPPED,
    holds_several_cells,
    save_outcome,
)

# Groups whose options have different keys.
COMPONENTS = (
    *("model", "editor", "restraint", "dataset"),
    *("suite", "evaluation", "stats", "tracker"),
)


class JobFailed(Exception):
    """A job of a sweep failed. Its error has been reported; the other jobs continue."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run(arguments: Sequence[str]) -> int:
    """Runs what the arguments after `editkit run` describe and returns the exit code. The exit code
    of a sweep is that of its first failed cell.
    """
    import hydra

    from editkit.sweeps.sweeper import SweepIncomplete

    application = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=ROOT)(
        hydra_task
    )
    try:
        require_keys(parse_hydra_arguments(arguments)[0])
        arguments = flags_first(stacked_trackers(arguments))
        with hydra_arguments(defer_component_values(arguments)):
            application()
    except (JobFailed, SweepIncomplete) as failure:
        return failure.code
    except SystemExit as stop:
        return int(stop.code or OK)
    except composition_errors() as error:
        report(explained(error, *parse_hydra_arguments(arguments)))
        return INVALID
    return OK


def defer_component_values(arguments: Sequence[str]) -> list[str]:
    """The arguments of a sweep with the values of component options as sweeps over one value:
    `restraint.prune.alpha=choice(1.6)`.

    Hydra first composes the overrides that are common to all cells. There a swept group still has
    its default option, which may lack the key. A swept value is applied in each cell instead.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import OverrideType

    overrides, _ = parse_hydra_arguments(arguments)
    is_sweep = {"--multirun", "-m"} & set(arguments) or any(
        override.startswith("sweep=") for override in overrides
    )
    if not is_sweep:
        return list(arguments)
    deferred = {}
    for text, override in zip(
        overrides, OverridesParser.create().parse_overrides(overrides), strict=True
    ):
        group, _, option = override.key_or_group.partition(".")
        if (
            override.type is OverrideType.CHANGE
            and not override.is_sweep_override()
            and option
            and group in COMPONENTS
            and override.value() is not None  # Hydra does not accept choice(null)
        ):
            key, _, value = text.partition("=")
            deferred[text] = f"{key}=choice({value})"
    return [deferred.get(argument, argument) for argument in arguments]


def hydra_task(config: Any) -> None:
    """The task function of Hydra, in the process that its launcher chose. It exits with the exit
    code of a single run.

    Raises:
        JobFailed: a job of a sweep failed.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    context = HydraConfig.get()
    choices = context.runtime.choices
    if context.mode is RunMode.RUN:
        raise SystemExit(execute(config, choices).code)
    folder, number = Path(context.sweep.dir), context.job.num
    is_planned, started = (folder / CELLS).exists(), time.time()
    record = {"code": None, "error": None, "host": platform.node(), "pid": os.getpid()}
    if is_planned:
        save_outcome(folder, number, record)
    # A waiting sweeper runs the cells of a refused shared run separately. Each cell then reports
    # its own problems, so the shared run does not.
    is_silent = (
        is_planned and not context.launcher.get("detach") and holds_several_cells(folder, number)
    )
    outcome = execute(
        config,
        choices,
        label=f"job {number} ({' '.join(context.overrides.task)})",
        is_cell=True,
        reports_invalid=not is_silent,
    )
    if is_planned:
        end = {
            "code": outcome.code,
            "error": outcome.error,
            "folder": os.path.relpath(outcome.folder, folder) if outcome.folder else None,
            "seconds": round(time.time() - started, 3),
        }
        save_outcome(folder, number, record | end)
    if outcome.code > STOPPED:
        raise SystemExit(outcome.code)  # a signal to a job stops the whole sweep
    if outcome.code != OK:
        raise JobFailed(outcome.code)


@dataclass(frozen=True, kw_only=True)
class RunOutcome:
    """The end of a run: its exit code, its error on one line, and its folder if it is known."""

    code: int
    error: str | None = None
    folder: Path | None = None


def execute(
    config: Any,
    choices: Mapping[str, Any],
    *,
    label: str = "",
    is_cell: bool = False,
    reports_invalid: bool = True,
) -> RunOutcome:
    """Builds and runs one configuration. Every error becomes an exit code.

    Args:
        label: names the run in error messages.
        is_cell: the run is a cell of a sweep, where failed runs are not always retried.
        reports_invalid: whether an invalid configuration is reported on stderr.
    """
    from editkit.config.build import build

    make_importable(Path.cwd())  # repeated: a launcher may run this in another process
    folder = None
    try:
        experiment = build(config, choices=choices)
        from editkit.runner import session

        folder = experiment.folder
        with unwritable_is_invalid(folder):
            leaves_failed = is_cell and not experiment.retry_failed
            return RunOutcome(
                code=session.run(experiment, leave_failed=leaves_failed), folder=folder
            )
    except Exception as error:
        invalid = as_invalid(error)
        if invalid is not None:
            if invalid.exit_code != INVALID or reports_invalid:
                report(invalid, label=label)
            text = " ".join(str(invalid).split())
            return RunOutcome(code=invalid.exit_code, error=text, folder=folder)
        report_failure(label)
        return RunOutcome(
            code=FAILURE, error=" ".join(f"{type(error).__name__}: {error}".split()), folder=folder
        )


def flags_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with Hydra's flags before the overrides. Hydra's parser takes flags before or
    after all overrides, and refuses `a=b --multirun c=d`.
    """
    overrides, _ = parse_hydra_arguments(arguments)
    flags = list(arguments)
    for override in overrides:
        flags.remove(override)
    return [*flags, *overrides]


def parse_hydra_arguments(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The overrides among Hydra's arguments, and the folder of --config-dir."""
    from hydra._internal.utils import get_args_parser

    parsed = get_args_parser().parse_intermixed_args(list(arguments))
    return parsed.overrides, Path(parsed.config_dir) if parsed.config_dir else None


@contextlib.contextmanager
def hydra_arguments(arguments: Sequence[str]) -> Iterator[None]:
    """Passes arguments to Hydra, which reads sys.argv. Hydra raises exceptions only with
    HYDRA_FULL_ERROR.
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
    """Makes modules of the folder importable, for `_target_: mine.Mine`. The folder is the last
    entry of sys.path, so that it hides no installed module.
    """
    if str(folder) not in sys.path and "" not in sys.path:
        sys.path.append(str(folder))


def report_failure(label: str) -> None:
    """Writes the current exception to stderr, with its traceback."""
    sys.stderr.write(f"{label or 'editkit'}: internal failure\n{traceback.format_exc()}")
