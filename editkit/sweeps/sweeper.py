"""The sweeper that `editkit run --multirun` uses: Hydra's grid, planned, launched by any launcher,
and summed up.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from omegaconf import open_dict

from editkit.config.build import Place, locate
from editkit.config.compose import explain_composition_error
from editkit.errors import ConfigError, report
from editkit.sweeps import summary
from editkit.sweeps.merge import Candidate
from editkit.sweeps.plan import CELLS, JOBS, Plan, load_outcome, note_death, save_plan
from editkit.sweeps.planner import Broken, make_plan, split, to_launch

# how often a run is launched whose job ended without a word, as when joblib takes down a whole pool
# for one dead worker
ATTEMPTS = 2


class SweepEnded(Exception):
    """The sweep is over and not everything is done; that was shown."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class CellSweeper(Sweeper):
    """Hydra's own grid (`hydra.sweeper.params` and the command line), but only for what is not done
    yet.
    """

    def __init__(self, *, max_batch_size: int | None, params: Mapping[str, Any] | None) -> None:
        self.max_batch_size, self.params = max_batch_size, dict(params or {})
        self.config: Any = None
        self.hydra_context: Any = None
        self.launcher: Any = None
        self.not_composed: HydraException | None = None  # the first cell's

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        """Hydra's hook; makes the launcher."""
        from hydra.core.plugins import Plugins

        self.config, self.hydra_context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Plans, launches and sums up. Raises SweepEnded unless every cell is done, or the launcher
        does not wait.
        """
        cells = [
            self._candidate(number, tuple(overrides))
            for number, overrides in enumerate(self._grid(arguments))
        ]
        if self.not_composed is not None and not any(isinstance(each, Candidate) for each in cells):
            raise self.not_composed  # a mistake of the command, not of one cell
        folder = Path(self.config.hydra.sweep.dir)
        plan = make_plan(
            cells,
            place_of=self._place,
            earlier=sorted(path.parent for path in folder.parent.glob(f"*/{CELLS}")),
        )
        shutil.rmtree(
            folder / JOBS, ignore_errors=True
        )  # of a sweep that was told to use the same folder
        before = summary.statuses_of(plan, folder)
        settings = next(
            (each.place.settings for each in cells if isinstance(each, Candidate)), None
        )
        todo = (
            to_launch(before, retry_failed=settings.retry_failed, anew=settings.resume == "never")
            if settings
            else []
        )
        save_plan(plan, folder)
        for same in by_error([each for each in cells if isinstance(each, Broken)]):
            first, others = same[0], "".join(f", {each.number}" for each in same[1:])
            report(first.error, label=f"job {first.number}{others} ({' '.join(first.overrides)})")
        say(summary.announcement(plan, before, todo))
        sound = {each.number: each for each in cells if isinstance(each, Candidate)}
        plan, stopped = self._launch(plan, todo, folder, sound)
        if todo and not stopped and getattr(self.launcher, "detach", False):
            say([f"editkit status {folder}"])
            return
        after = summary.statuses_of(plan, folder)
        say([*summary.closing(plan, after, before), f"editkit status {folder}"])
        if code := stopped or summary.exit_code(plan, after, folder):
            raise SweepEnded(code)

    def _launch(
        self, plan: Plan, todo: Sequence[int], folder: Path, candidates: Mapping[int, Candidate]
    ) -> tuple[Plan, int]:
        """Launches these runs; the plan that knows their jobs, and the exit code of a sweep that
        was stopped.
        """
        left, next_job = list(todo), 0
        while left:
            plan = plan.launched(
                {place: next_job + position for position, place in enumerate(left)}
            )
            save_plan(plan, folder)
            first, next_job = next_job, next_job + len(left)
            try:
                size = self.max_batch_size or len(left)
                for start in range(0, len(left), size):
                    batch = [
                        list(plan.runs[place].overrides) for place in left[start : start + size]
                    ]
                    self.launcher.launch(batch, initial_job_idx=first + start)
            except KeyboardInterrupt:
                return plan, summary.STOPPED_BY_HAND
            except SystemExit as stop:  # whoever stops a job means the sweep
                return plan, int(stop.code or 0)
            except ConfigError:
                raise
            except (
                Exception
            ) as error:  # a launcher that gave up, not a job: those note how they end
                say([f"the launcher gave up: {type(error).__name__}: {error}"])
            if getattr(self.launcher, "detach", False):
                return plan, 0
            codes = {
                place: (load_outcome(folder, plan.runs[place].jobs[-1]) or {}).get("code")
                for place in left
            }
            for place in [
                place
                for place, code in codes.items()
                if code == summary.MISTAKE and len(plan.cells_of(place)) > 1
            ]:
                say(
                    [
                        f"the views of one run are tried apart: {' '.join(plan.runs[place].overrides)}"
                    ]
                )
                known = len(plan.runs)
                plan = split(plan, place, candidates)
                codes |= {place: None} | dict.fromkeys(range(known, len(plan.runs)))
            left = [place for place, code in codes.items() if code is None]
            for place in [place for place in left if len(plan.runs[place].jobs) >= ATTEMPTS]:
                note_death(
                    folder, plan.runs[place].jobs[-1], "its process ended without a word: killed?"
                )
                left.remove(place)
        return plan, 0

    def _grid(self, arguments: Sequence[str]) -> list[list[str]]:
        """The product of the grid's values; the command line wins over a grid by name."""
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides(
            [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        )
        (cells,) = BasicSweeper.split_arguments(overrides, None)
        return cells

    def _candidate(self, number: int, overrides: tuple[str, ...]) -> Candidate | Broken:
        try:
            return Candidate(number=number, overrides=overrides, place=self._place(overrides))
        except ConfigError as error:
            return Broken(number=number, overrides=overrides, error=error)
        except HydraException as error:
            self.not_composed = self.not_composed or error
            return Broken(
                number=number,
                overrides=overrides,
                error=ConfigError(explain_composition_error(error, overrides) or str(error).splitlines()[0]),
            )

    def _place(self, overrides: Sequence[str]) -> Place:
        """Composes as the launcher will. Raises ConfigError and Hydra's own exceptions."""
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        choices = dict(config.hydra.runtime.choices)
        with open_dict(config):
            del config["hydra"]
        return locate(config, choices=choices)


def by_error(broken: Sequence[Broken]) -> list[list[Broken]]:
    """Cells that cannot be run, those with the same mistake together."""
    found: dict[str, list[Broken]] = {}
    for each in broken:
        found.setdefault(str(each.error), []).append(each)
    return list(found.values())


def say(lines: Sequence[str]) -> None:
    """Shows lines on stdout."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(f"sweep: {line}", markup=False)
