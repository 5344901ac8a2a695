"""From the cells of a grid to the runs that are needed: views merged, what earlier sweeps finished
found again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from editkit.config.build import Place
from editkit.errors import ConfigError
from editkit.records.views import UNRESTRAINED
from editkit.sweeps.merge import Candidate, Merged, merge, trajectories
from editkit.sweeps.plan import CELLS, Cell, Plan, Run, load_plan
from editkit.sweeps.state import RunStatus, look


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A cell that cannot be run."""

    number: int
    overrides: tuple[str, ...]
    error: ConfigError


def make_plan(
    candidates: Sequence[Candidate | Broken],
    *,
    place_of: Callable[[Sequence[str]], Place],
    earlier: Iterable[Path] = (),
) -> Plan:
    """The sweep of these cells.

    Args:
        place_of: composes overrides and says where their run writes.
        earlier: folders of sweeps, whose finished runs are used again.
    """
    sound = [each for each in candidates if isinstance(each, Candidate)]
    before = (
        _finished(earlier) if any(each.place.settings.resume == "auto" for each in sound) else {}
    )
    runs: list[Run] = []
    cells: dict[int, Cell] = {}

    def add(
        overrides: tuple[str, ...],
        folder: Path,
        members: Iterable[tuple[Candidate, tuple[str, ...]]],
    ) -> None:
        members = list(members)
        settings = members[0][0].place.settings
        for cell, views in members:
            cells[cell.number] = _cell(cell, run=len(runs), views=views)
        runs.append(
            Run(
                overrides=overrides,
                folder=folder,
                edits=settings.edits,
                batch_size=settings.batch_size,
            )
        )

    for group in trajectories(sound):
        merged, folder = _merged(group, place_of)
        rest = group
        if (
            len(group) > 1
            and group[0].place.settings.resume == "auto"
            and look(folder).state == "missing"
        ):
            rest = []
            for cell in group:
                if look(cell.place.folder).state == "done":
                    add(
                        cell.overrides,
                        cell.place.folder,
                        [(cell, cell.place.totals or (UNRESTRAINED,))],
                    )
                elif known := before.get(cell.place.folder.absolute()):
                    add(cell.overrides, known[0], [(cell, known[1])])
                else:
                    rest.append(cell)
            if rest and len(rest) < len(group):
                merged, folder = _merged(rest, place_of)
        if rest:
            add(merged.overrides, folder, [(cell, merged.views[cell.number]) for cell in rest])
    for each in candidates:
        if isinstance(each, Broken):
            cells[each.number] = Cell(
                number=each.number,
                overrides=each.overrides,
                own=None,
                run=None,
                views=(),
                problem=" ".join(str(each.error).split()),
            )
    return Plan(cells=tuple(cells[number] for number in sorted(cells)), runs=tuple(runs))


def split(plan: Plan, place: int, candidates: Mapping[int, Candidate]) -> Plan:
    """The plan with a run of its own for each cell that shared one: what one view cannot do should
    not stop the others.
    """
    runs, cells = list(plan.runs), list(plan.cells)
    for position, cell in enumerate(plan.cells_of(place)):
        own = candidates[cell.number]
        run = Run(
            overrides=cell.overrides,
            folder=own.place.folder,
            edits=runs[place].edits,
            batch_size=runs[place].batch_size,
        )
        to = place if position == 0 else len(runs)
        runs[to:] = [run, *runs[to + 1 :]]
        cells[plan.cells.index(cell)] = _cell(
            own, run=to, views=own.place.totals or (UNRESTRAINED,)
        )
    return Plan(cells=tuple(cells), runs=tuple(runs))


def to_launch(statuses: Sequence[RunStatus], *, retry_failed: bool, anew: bool) -> list[int]:
    """The places of the runs that have to be launched; `anew`: also those that are done
    (resume=never).
    """
    wanted = {
        "missing",
        "cut off",
        "running",
        *(["failed"] if retry_failed or anew else []),
        *(["done"] if anew else []),
    }
    return [place for place, status in enumerate(statuses) if status.state in wanted]


def _merged(
    group: Sequence[Candidate], place_of: Callable[[Sequence[str]], Place]
) -> tuple[Merged, Path]:
    merged = merge(group)
    same = next((cell for cell in group if cell.overrides == merged.overrides), None)
    return merged, (same.place if same else place_of(merged.overrides)).folder


def _cell(cell: Candidate, *, run: int, views: tuple[str, ...]) -> Cell:
    return Cell(
        number=cell.number,
        overrides=cell.overrides,
        own=cell.place.folder,
        run=run,
        views=views,
        problem=None,
    )


def _finished(folders: Iterable[Path]) -> dict[Path, tuple[Path, tuple[str, ...]]]:
    """Where the results of cells are that earlier sweeps computed in another run than the cell's
    own: by the folder that is its own.
    """
    found: dict[Path, tuple[Path, tuple[str, ...]]] = {}
    for folder in folders:
        if not (folder / CELLS).exists():
            continue
        try:
            plan = load_plan(folder)
        except ConfigError:
            continue
        for cell in plan.cells:
            if (
                cell.own is not None
                and cell.run is not None
                and look(plan.runs[cell.run].folder).state == "done"
            ):
                found[cell.own.absolute()] = (plan.runs[cell.run].folder, cell.views)
    return found
