"""The runs that a grid needs: views of one trajectory share a run, finished runs are reused, failed
ones are skipped.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from editkit.config.build import Place, locate
from editkit.config.compose import Composed, compose, options
from editkit.errors import ConfigError
from editkit.sweeps import summary
from editkit.sweeps.merge import ValidCell, literal, merge, trajectories
from editkit.sweeps.plan import (
    CELLS,
    Plan,
    holds_several_cells,
    load_outcome,
    load_plan,
    record_death,
    save_outcome,
    save_plan,
)
from editkit.sweeps.planner import InvalidCell, make_plan, split, to_launch
from editkit.sweeps.state import RunStatus, read_status
from editkit.sweeps.sweeper import CellSweeper

NONE, PRUNE, LINEAR = ("restraint=none",), ("restraint=prune",), ("restraint=prune_linear",)


@functools.lru_cache(maxsize=64)
def composed(*overrides: str) -> Composed:
    return compose(["suite=none", "edits=4", *overrides])


def place_of(overrides: Sequence[str]) -> Place:
    """Composing takes long, so it is done once for all folders."""
    chosen = composed(*(override for override in overrides if not override.startswith("paths.")))
    outputs = [
        override.partition("=")[2]
        for override in overrides
        if override.startswith("paths.outputs=")
    ]
    config = chosen.config | ({"paths": {"outputs": outputs[0]}} if outputs else {})
    return locate(config, choices=chosen.choices)


def cells(*grid: Sequence[str], outputs: Path) -> list[ValidCell]:
    overridden = [(*overrides, f"paths.outputs={outputs}") for overrides in grid]
    return [
        ValidCell(number=number, overrides=overrides, place=place_of(overrides))
        for number, overrides in enumerate(overridden)
    ]


def plan_of(candidates: Sequence[ValidCell], **options: list[Path]) -> Plan:
    return make_plan(candidates, place_of=place_of, **options)


def finish(folder: Path, steps: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.jsonl").write_text(
        "".join(json.dumps({"step": step}) + "\n" for step in range(steps + 1))
    )
    (folder / "DONE").touch()


def fail(folder: Path, error: str = "ValueError: no") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "FAILED.json").write_text(json.dumps({"kind": "error", "error": error}))


def launched(plan: Plan, *, retry_failed: bool = False, restart: bool = False) -> list[int]:
    return to_launch(
        [read_status(run.folder) for run in plan.runs], retry_failed=retry_failed, restart=restart
    )


# --- merging


def test_a_restraint_on_the_total_and_none_share_the_run_of_the_former(tmp_path: Path) -> None:
    none, prune = cells(NONE, PRUNE, outputs=tmp_path)
    plan = plan_of([none, prune])
    (run,) = plan.runs
    assert run.folder == prune.place.folder, "so a run of its own, made before, is found"
    assert [cell.views for cell in plan.cells] == [("unrestrained",), ("prune",)]
    assert summary.shared_views(plan) == "unrestrained + prune (1 run)"


def test_a_restraint_on_the_edits_needs_its_own_run(tmp_path: Path) -> None:
    grid = [
        *(NONE, PRUNE, ("restraint=rect",), ("restraint=[rect,prune]",)),
        *(("restraint=prune", "seed=1"), ("restraint=prune", "restraint.prune.apply_at=end")),
    ]
    groups = trajectories(cells(*grid, outputs=tmp_path))
    assert [[cell.number for cell in group] for group in groups] == [[0, 1], [2, 3], [4], [5]]


def test_three_kinds_of_view_share_a_run_that_composes(tmp_path: Path) -> None:
    other = ("restraint=prune", "restraint.prune.alpha=1.7")
    candidates = cells(NONE, PRUNE, other, LINEAR, outputs=tmp_path)
    plan = plan_of(candidates)
    (run,) = plan.runs
    place = place_of(run.overrides)
    assert place.folder == run.folder
    assert set(place.totals) == {"prune", "prune-alpha1_7", "prune_linear"}
    assert (
        place.config["restraint"]["prune-alpha1_7"]
        == candidates[2].place.config["restraint"]["prune"]
    )
    assert [cell.views for cell in plan.cells] == [
        ("unrestrained",),
        ("prune",),
        ("prune-alpha1_7",),
        ("prune_linear",),
    ]


def test_the_merged_run_is_the_same_for_the_cells_in_any_order(tmp_path: Path) -> None:
    candidates = cells(
        LINEAR, PRUNE, ("restraint=prune", "restraint.prune.alpha=2"), NONE, outputs=tmp_path
    )
    folders = {
        place_of(merge(order).overrides).folder
        for order in (candidates, candidates[::-1], candidates[2:] + candidates[:2])
    }
    assert len(folders) == 1


def test_cells_of_several_views_name_them_all(tmp_path: Path) -> None:
    plan = plan_of(cells(("restraint=[prune,prune_linear]",), PRUNE, outputs=tmp_path))
    assert len(plan.runs) == 1
    assert [cell.views for cell in plan.cells] == [("prune", "prune_linear"), ("prune",)]


def test_a_shared_run_can_be_split(tmp_path: Path) -> None:
    candidates = cells(NONE, ("restraint=rect",), PRUNE, outputs=tmp_path)
    merged = plan_of(candidates)
    separate = split(merged, merged.cells[0].run or 0, {cell.number: cell for cell in candidates})
    assert len(merged.runs) == 2 and len(separate.runs) == 3
    assert [separate.runs[cell.run or 0].folder for cell in separate.cells] == [
        cell.place.folder for cell in candidates
    ]
    assert separate.cells[1] == merged.cells[1]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        1,
        1.5e-06,
        "log",
        'a "quoted" one',
        'back\\slash "',
        "ends\\",
        "a, b: [c] {d}",
        "",
        [1, "two", None],
        {"a": {"b": [1.0]}},
    ],
    ids=repr,
)
def test_a_plain_value_survives_hydras_command_line(value: object) -> None:
    (override,) = OverridesParser.create().parse_overrides([f"+key={literal(value)}"])
    parsed = override.value()
    assert json.loads(json.dumps(parsed, default=str)) == value


# --- what is left to do


def test_done_cells_are_skipped_interrupted_ones_resume_and_failed_ones_wait_for_retry_failed(
    tmp_path: Path,
) -> None:
    plan = plan_of(cells(*([f"seed={seed}"] for seed in range(4)), outputs=tmp_path))
    finish(plan.runs[0].folder)
    fail(plan.runs[1].folder)
    plan.runs[2].folder.mkdir(parents=True)
    (plan.runs[2].folder / "steps.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"ste')
    states = [read_status(run.folder) for run in plan.runs]
    assert [status.state for status in states] == ["done", "failed", "interrupted", "missing"]
    assert [status.step for status in states] == [4, None, 1, None]
    assert launched(plan) == [2, 3]
    assert launched(plan, retry_failed=True) == [1, 2, 3]
    assert launched(plan, restart=True) == [0, 1, 2, 3]


def test_a_view_that_was_run_alone_before_is_not_run_again(tmp_path: Path) -> None:
    candidates = cells(PRUNE, ("restraint=prune", "restraint.prune.alpha=1.5"), outputs=tmp_path)
    finish(candidates[0].place.folder)
    plan = plan_of(candidates)
    assert [run.folder for run in plan.runs] == [cell.place.folder for cell in candidates]
    assert launched(plan) == [1]


def test_views_that_an_earlier_sweep_measured_together_are_reused(tmp_path: Path) -> None:
    two = cells(PRUNE, LINEAR, outputs=tmp_path)
    before = plan_of(two)
    finish(before.runs[0].folder)
    save_plan(before, tmp_path / "multirun" / "first")
    three = cells(PRUNE, LINEAR, ("restraint=prune", "restraint.prune.alpha=1.5"), outputs=tmp_path)
    plan = plan_of(three, earlier=[tmp_path / "multirun" / "first"])
    assert [plan.runs[place].folder for place in launched(plan)] == [three[2].place.folder]
    assert [cell.views for cell in plan.cells] == [("prune",), ("prune_linear",), ("prune",)]
    assert launched(plan_of(two)) == [], "and the same two find their common run by themselves"


def test_resume_never_takes_nothing_from_before(tmp_path: Path) -> None:
    candidates = cells((*PRUNE, "resume=never"), (*LINEAR, "resume=never"), outputs=tmp_path)
    finish(candidates[0].place.folder)
    assert len(plan_of(candidates).runs) == 1


# --- files


def test_a_plan_is_read_back_also_after_the_outputs_were_moved(tmp_path: Path) -> None:
    broken = InvalidCell(number=2, overrides=("edits=0",), error=ConfigError("edits: 0 was given"))
    plan = make_plan(
        [*cells(NONE, PRUNE, outputs=tmp_path / "a"), broken], place_of=place_of
    ).launched({0: 5})
    save_plan(plan, tmp_path / "a" / "multirun" / "s")
    assert load_plan(tmp_path / "a" / "multirun" / "s") == plan
    finish(plan.runs[0].folder)
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = load_plan(tmp_path / "b" / "multirun" / "s")
    assert (
        moved.runs[0].folder.is_relative_to(tmp_path / "b")
        and read_status(moved.runs[0].folder).state == "done"
    )


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 9}', '{"version": 1, "cells": [{"number": 1}], "runs": []}']
)
def test_a_plan_that_cannot_be_read_is_an_error_that_names_the_file(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / CELLS).write_text(text)
    with pytest.raises(ConfigError, match=r"cells\.json: cannot be read as the plan of a sweep"):
        load_plan(tmp_path)


def test_a_job_that_died_is_recorded_and_a_recorded_end_is_kept(tmp_path: Path) -> None:
    save_outcome(tmp_path, 0, {"code": None, "pid": 7})
    record_death(tmp_path, 0, "killed?")
    assert load_outcome(tmp_path, 0) == {"code": 1, "pid": 7, "error": "killed?"}
    save_outcome(tmp_path, 1, {"code": 2, "error": "a mistake"})
    record_death(tmp_path, 1, "killed?")
    assert (load_outcome(tmp_path, 1) or {})["error"] == "a mistake"
    assert load_outcome(tmp_path, 2) is None


def test_a_job_knows_whether_its_run_holds_several_cells(tmp_path: Path) -> None:
    save_plan(
        plan_of(cells(NONE, PRUNE, ("restraint=rect",), outputs=tmp_path)).launched({0: 3, 1: 4}),
        tmp_path,
    )
    assert [holds_several_cells(tmp_path, job) for job in (3, 4, 5)] == [True, False, False]
    assert not holds_several_cells(tmp_path / "nowhere", 3)


def test_views_of_a_run_that_died_once_and_then_could_not_be_are_still_tried_apart(
    tmp_path: Path,
) -> None:
    candidates = cells(NONE, PRUNE, outputs=tmp_path)
    codes = iter([None, 2, 0, None, None])  # killed, a mistake; apart: done, killed, killed
    launches: list[int] = []

    class Launcher:
        def launch(self, jobs: Sequence[Sequence[str]], initial_job_idx: int) -> None:
            launches.append(len(jobs))
            for job in range(len(jobs)):
                save_outcome(tmp_path, initial_job_idx + job, {"code": next(codes), "error": None})

    sweeper = CellSweeper(max_batch_size=None, params=None)
    sweeper.launcher = Launcher()
    plan, stopped = sweeper._launch(
        plan_of(candidates), [0], tmp_path, {cell.number: cell for cell in candidates}
    )
    assert (launches, stopped) == ([1, 1, 2, 1], 0)
    ends = [load_outcome(tmp_path, run.jobs[-1]) or {} for run in plan.runs]
    assert [end["code"] for end in ends] == [0, 1] and "killed?" in ends[1]["error"]


# --- how it ended


def test_the_exit_code_is_that_of_the_first_cell_that_failed_and_3_if_others_have_the_rest(
    tmp_path: Path,
) -> None:
    plan = plan_of(cells(*([f"seed={seed}"] for seed in range(3)), outputs=tmp_path)).launched(
        {0: 0, 1: 1, 2: 2}
    )

    def code(*states: str) -> int:
        return summary.exit_code(plan, [RunStatus(state=state) for state in states], tmp_path)  # type: ignore[arg-type]

    assert code("done", "done", "done") == 0
    assert code("done", "running", "done") == 3
    assert code("running", "failed", "done") == 1
    save_outcome(tmp_path, 2, {"code": 2, "error": "restraint.prune.alpha"})
    assert code("done", "running", "missing") == 2
    statuses = summary.statuses_of(plan, tmp_path)
    assert statuses[2].state == "failed" and statuses[2].error == "restraint.prune.alpha"


def test_the_closing_lines_name_every_failed_cell_and_count_repeated_steps(
    tmp_path: Path,
) -> None:
    plan = plan_of(cells(*([f"seed={seed}", "edits=4"] for seed in range(3)), outputs=tmp_path))
    before = [
        RunStatus(state="done"),
        RunStatus(state="interrupted", step=3, saved_step=2),
        RunStatus(state="missing"),
    ]
    after = [
        RunStatus(state="done"),
        RunStatus(state="done", steps_made_again=1),
        RunStatus(state="failed", error="ValueError: no"),
    ]
    lines = summary.closing_lines(plan, after, before)
    assert lines[0] == "2 done, 0 running, 1 failed, 0 interrupted, 0 missing of 3 cells"
    assert lines[1] == "failed: cell 2 (seed=2): ValueError: no"
    assert lines[2] == "1 run resumed from a checkpoint; 1 step made again"


def test_a_long_error_is_shortened_in_the_table(tmp_path: Path) -> None:
    assert summary.shortened("x" * 1000) == "x" * 297 + "..."


# --- configurations


@pytest.mark.parametrize("name", [option.name for option in options() if option.group == "sweep"])
def test_every_grid_by_name_is_a_multirun_whose_cells_have_a_place(
    name: str, tmp_path: Path
) -> None:
    import hydra

    from editkit.config.compose import ROOT, conf_folder

    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = hydra.compose(ROOT, overrides=[f"sweep={name}"], return_hydra_config=True)
    assert str(config.hydra.mode).endswith("MULTIRUN"), (
        "hydra: {mode: MULTIRUN}, so that a grid is never run as one cell"
    )
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    params = [f"{key}={value}" for key, value in config.hydra.sweeper.params.items()]
    (grid,) = BasicSweeper.split_arguments(
        OverridesParser.create().parse_overrides([f"sweep={name}", *params]), None
    )
    assert len(grid) > 1
    for overrides in (grid[0], grid[-1]):
        chosen = compose([*overrides, f"paths.outputs={tmp_path}"])
        assert locate(chosen.config, choices=chosen.choices).folder.is_relative_to(tmp_path)
