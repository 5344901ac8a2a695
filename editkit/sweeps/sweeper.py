"""The sweeper of `editkit run --multirun`: Hydra's grid, planned, launched by any launcher, and
summarized.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from omegaconf import open_dict

from editkit.config.build import Place, locate
from editkit.config.compose import explain_composition_error
from editkit.errors import ConfigError, report
from editkit.sweeps import summary
from editkit.sweeps.grid import cells_of_grid
from editkit.sweeps.merge import ValidCell
from editkit.sweeps.plan import (
    CELLS,
    INVALID,
    JOBS,
    OK,
    STOPPED,
    Plan,
    load_outcome,
    record_death,
    save_plan,
)
from editkit.sweeps.planner import InvalidCell, make_plan, split, to_launch

# Launches of a run whose job ends without recording its end. joblib, for example, ends a whole pool
# when one worker dies.
ATTEMPTS = 2
INTERRUPTED = STOPPED + 2  # exit code after Ctrl-C


class SweepIncomplete(Exception):
    """The sweep ended and some cells are not done. They have been reported."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class CellSweeper(Sweeper):
    """Hydra's basic grid (`hydra.sweeper.params` and the command line) and listed cells
    (`hydra.sweeper.cells`), restricted to the cells that are not done yet.
    """

    def __init__(
        self,
        *,
        max_batch_size: int | None,
        params: Mapping[str, Any] | None,
        cells: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.max_batch_size, self.params = max_batch_size, dict(params or {})
        self.listed = [list(overrides) for overrides in cells or ()]
        self.config: Any = None
        self.hydra_context: Any = None
        self.launcher: Any = None
        self.composition_error: HydraException | None = None  # of the first cell that has one

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Hydra's hook. It creates the launcher."""
        from hydra.core.plugins import Plugins

        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Plans and launches the sweep, and shows its summary.

        Raises:
            SweepIncomplete: some cells are not done, and the launcher waited for its jobs.
        """
        grid = cells_of_grid(
            self.params,
            arguments,
            listed=self.listed,
            config_loader=self.hydra_context.config_loader,
        )
        cells = [self._cell(number, tuple(overrides)) for number, overrides in enumerate(grid)]
        valid = {cell.number: cell for cell in cells if isinstance(cell, ValidCell)}
        if self.composition_error is not None and not valid:
            raise self.composition_error  # the command is wrong, and not one cell
        folder = Path(self.config.hydra.sweep.dir)
        earlier = sorted(path.parent for path in folder.parent.glob(f"*/{CELLS}"))
        plan = make_plan(cells, place_of=self._place, earlier=earlier)
        shutil.rmtree(folder / JOBS, ignore_errors=True)  # of an earlier sweep in this folder
        before = summary.statuses_of(plan, folder)
        launched: list[int] = []
        if valid:
            settings = next(iter(valid.values())).place.settings
            restart = settings.resume == "never"
            launched = to_launch(before, retry_failed=settings.retry_failed, restart=restart)
        save_plan(plan, folder)
        report_invalid(cell for cell in cells if isinstance(cell, InvalidCell))
        show_lines(summary.opening_lines(plan, before, launched))
        plan, stopped = self._launch(plan, launched, folder, valid)
        if launched and not stopped and self._is_detached:
            show_lines([f"editkit status {folder}"])
            return
        after = summary.statuses_of(plan, folder)
        show_lines([*summary.closing_lines(plan, after, before), f"editkit status {folder}"])
        if code := stopped or summary.exit_code(plan, after, folder):
            raise SweepIncomplete(code)

    @property
    def _is_detached(self) -> bool:
        """Whether the launcher returns before its jobs end."""
        return bool(getattr(self.launcher, "detach", False))

    def _launch(
        self, plan: Plan, launched: Sequence[int], folder: Path, valid: Mapping[int, ValidCell]
    ) -> tuple[Plan, int]:
        """Launches runs until each has ended, was refused, or died twice.

        Returns:
            the plan with the numbers of the jobs, and the exit code of a stopped sweep or 0.
        """
        waiting, next_job = list(launched), 0
        while waiting:
            plan = plan.launched(
                {index: next_job + position for position, index in enumerate(waiting)}
            )
            save_plan(plan, folder)
            stopped = self._launch_jobs(plan, waiting, next_job)
            if stopped is not None:
                return plan, stopped
            next_job += len(waiting)
            if self._is_detached:
                return plan, OK
            codes = {
                index: (load_outcome(folder, plan.runs[index].jobs[-1]) or {}).get("code")
                for index in waiting
            }
            refused = [
                index
                for index, code in codes.items()
                if code == INVALID and len(plan.cells_of(index)) > 1
            ]
            for index in refused:
                overrides = " ".join(plan.runs[index].overrides)
                show_lines([f"the views of a refused run are run separately: {overrides}"])
                count = len(plan.runs)
                plan = split(plan, index, valid)
                codes |= {index: None} | dict.fromkeys(range(count, len(plan.runs)))
            unfinished = [index for index, code in codes.items() if code is None]
            waiting = [index for index in unfinished if len(plan.runs[index].jobs) < ATTEMPTS]
            for index in unfinished:
                if index not in waiting:
                    error = "the process ended without recording an error: killed?"
                    record_death(folder, plan.runs[index].jobs[-1], error)
        return plan, OK

    def _launch_jobs(self, plan: Plan, runs: Sequence[int], first_job: int) -> int | None:
        """Launches these runs in batches. Returns the exit code of a stopped sweep."""
        size = self.max_batch_size or len(runs)
        try:
            for start in range(0, len(runs), size):
                batch = [list(plan.runs[index].overrides) for index in runs[start : start + size]]
                self.launcher.launch(batch, initial_job_idx=first_job + start)
        except KeyboardInterrupt:
            return INTERRUPTED
        except SystemExit as stop:  # a signal to a job stops the whole sweep
            return int(stop.code or OK)
        except ConfigError:
            raise
        except Exception as error:  # of the launcher; jobs record their own errors
            show_lines([f"the launcher failed: {type(error).__name__}: {error}"])
        return None

    def _cell(self, number: int, overrides: tuple[str, ...]) -> ValidCell | InvalidCell:
        try:
            return ValidCell(number=number, overrides=overrides, place=self._place(overrides))
        except ConfigError as error:
            return InvalidCell(number=number, overrides=overrides, error=error)
        except HydraException as error:
            self.composition_error = self.composition_error or error
            text = explain_composition_error(error, overrides) or str(error).splitlines()[0]
            return InvalidCell(number=number, overrides=overrides, error=ConfigError(text))

    def _place(self, overrides: Sequence[str]) -> Place:
        """The place of a run, composed as the launcher will compose it.

        Raises:
            ConfigError: the configuration is invalid.
            HydraException: the overrides cannot be composed.
        """
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        choices = dict(config.hydra.runtime.choices)
        with open_dict(config):
            del config["hydra"]
        return locate(config, choices=choices)


def report_invalid(cells: Iterable[InvalidCell]) -> None:
    """Reports invalid cells on stderr. Cells with the same error are reported together."""
    by_error: dict[str, list[InvalidCell]] = {}
    for cell in cells:
        by_error.setdefault(str(cell.error), []).append(cell)
    for same in by_error.values():
        numbers = ", ".join(str(cell.number) for cell in same)
        report(same[0].error, label=f"job {numbers} ({' '.join(same[0].overrides)})")


def show_lines(lines: Sequence[str]) -> None:
    """Shows lines on stdout."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(f"sweep: {line}", markup=False)
