"""From the cells of a grid to the runs that are needed. Views of one trajectory are merged, and
runs that earlier sweeps finished are reused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from editkit.config.build import Place
from editkit.errors import ConfigError
from editkit.sweeps.merge import Merged, ValidCell, merge, trajectories
from editkit.sweeps.plan import CELLS, Cell, Plan, Run, load_plan
from editkit.sweeps.state import RunStatus, read_status


@dataclass(frozen=True, kw_only=True)
class InvalidCell:
    """A cell that cannot be run."""

    number: int
    overrides: tuple[str, ...]
    error: ConfigError


def make_plan(
    cells: Sequence[ValidCell | InvalidCell],
    *,
    place_of: Callable[[Sequence[str]], Place],
    earlier: Iterable[Path] = (),
) -> Plan:
    """The plan of a sweep of these cells.

    Args:
        place_of: composes overrides and returns the place of their run.
        earlier: folders of sweeps whose finished runs are reused.
    """
    valid = [cell for cell in cells if isinstance(cell, ValidCell)]
    resumes = any(cell.place.settings.resume == "auto" for cell in valid)
    finished = _finished(earlier) if resumes else {}
    runs: list[Run] = []
    planned: dict[int, Cell] = {}

    def add(
        overrides: tuple[str, ...],
        folder: Path,
        members: Sequence[tuple[ValidCell, tuple[str, ...]]],
    ) -> None:
        for cell, views in members:
            planned[cell.number] = _planned(cell, run=len(runs), views=views)
        runs.append(_run(members[0][0], overrides, folder))

    for group in trajectories(valid):
        merged, folder = _merged(group, place_of)
        rest = group
        may_reuse = len(group) > 1 and group[0].place.settings.resume == "auto"
        if may_reuse and read_status(folder).state == "missing":
            rest = []
            for cell in group:
                if read_status(cell.place.folder).state == "done":
                    add(cell.overrides, cell.place.folder, [(cell, cell.views)])
                elif reused := finished.get(cell.place.folder.absolute()):
                    add(cell.overrides, reused[0], [(cell, reused[1])])
                else:
                    rest.append(cell)
            if rest and len(rest) < len(group):
                merged, folder = _merged(rest, place_of)
        if rest:
            add(merged.overrides, folder, [(cell, merged.views[cell.number]) for cell in rest])
    for invalid in cells:
        if isinstance(invalid, InvalidCell):
            planned[invalid.number] = Cell(
                number=invalid.number,
                overrides=invalid.overrides,
                own=None,
                run=None,
                views=(),
                problem=" ".join(str(invalid.error).split()),
            )
    return Plan(cells=tuple(planned[number] for number in sorted(planned)), runs=tuple(runs))


def split(plan: Plan, run: int, valid: Mapping[int, ValidCell]) -> Plan:
    """The plan with a separate run for each cell of a shared run, so that a view that is refused
    does not stop the others.

    Args:
        run: the index of the shared run.
        valid: the valid cells by number.
    """
    runs, cells = list(plan.runs), list(plan.cells)
    for position, cell in enumerate(plan.cells_of(run)):
        own = valid[cell.number]
        index = run if position == 0 else len(runs)
        runs[index:] = [_run(own, cell.overrides, own.place.folder), *runs[index + 1 :]]
        cells[plan.cells.index(cell)] = _planned(own, run=index, views=own.views)
    return Plan(cells=tuple(cells), runs=tuple(runs))


def to_launch(statuses: Sequence[RunStatus], *, retry_failed: bool, restart: bool) -> list[int]:
    """The indices of the runs that must be launched.

    Args:
        retry_failed: failed runs are launched as well.
        restart: failed and finished runs are launched as well (resume=never).
    """
    launched = {"missing", "interrupted", "running"}
    if retry_failed or restart:
        launched.add("failed")
    if restart:
        launched.add("done")
    return [index for index, status in enumerate(statuses) if status.state in launched]


def _merged(
    group: Sequence[ValidCell], place_of: Callable[[Sequence[str]], Place]
) -> tuple[Merged, Path]:
    merged = merge(group)
    same = next((cell for cell in group if cell.overrides == merged.overrides), None)
    return merged, (same.place if same else place_of(merged.overrides)).folder


def _run(cell: ValidCell, overrides: tuple[str, ...], folder: Path) -> Run:
    settings = cell.place.settings
    return Run(
        overrides=overrides, folder=folder, edits=settings.edits, batch_size=settings.batch_size
    )


def _planned(cell: ValidCell, *, run: int, views: tuple[str, ...]) -> Cell:
    return Cell(
        number=cell.number,
        overrides=cell.overrides,
        own=cell.place.folder,
        run=run,
        views=views,
        problem=None,
    )


def _finished(folders: Iterable[Path]) -> dict[Path, tuple[Path, tuple[str, ...]]]:
    """The results of cells of earlier sweeps: the run's folder and the cell's views, by the folder
    of a run of the cell alone.
    """
    finished: dict[Path, tuple[Path, tuple[str, ...]]] = {}
    for folder in folders:
        if not (folder / CELLS).exists():
            continue
        try:
            plan = load_plan(folder)
        except ConfigError:
            continue
        for cell in plan.cells:
            if cell.own is None or cell.run is None:
                continue
            results = plan.runs[cell.run].folder
            if read_status(results).state == "done":
                finished[cell.own.absolute()] = (results, cell.views)
    return finished
