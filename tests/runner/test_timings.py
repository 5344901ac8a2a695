"""When edits are measured: immediately after each, at milestones and at the end; an interrupted run
measures the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from editkit.config.schedule import Schedule
from editkit.runner.checkpoint import RunState, load_state, save_state
from editkit.runner.loop import run_edits
from editkit.runner.plan import Trajectory, digest_of
from editkit.types import EditRequest, StepRecord
from tests.support.helpers import world_requests
from tests.support.timings import (
    ALL,
    PRUNE,
    evals,
    loud_run,
    value,
    with_values,
    written,
)


@pytest.fixture(scope="module")
def world() -> tuple[EditRequest, ...]:
    return world_requests(6)


def test_immediate_scores_are_those_of_stopping_after_each_edit(
    world: Sequence[EditRequest],
) -> None:
    events = list(run_edits(loud_run(world, timings=("milestone", "immediate"))))
    plain = loud_run(world, milestones=())
    evaluator = plain.evaluators["editing"]
    baseline = evaluator.baseline(plain.model, world)
    scores = []
    for event in run_edits(plain):
        if isinstance(event, StepRecord) and event.step:
            found = evaluator.evaluate(plain.model, [world[event.step - 1]], baseline)
            scores.append(
                {
                    (each.protocol, each.metric): each.value
                    for each in found
                    if getattr(each, "subset", 1) is None and not each.task
                }
            )
    for metric in ("efficacy", "generalization", "locality"):
        expected = sum(each["token", metric] for each in scores) / len(scores)
        assert value(events, step=6, metric=metric, timing="immediate") == pytest.approx(expected)
        lost = value(events, step=6, metric=f"{metric}_forgetting")
        assert lost == pytest.approx(expected - value(events, step=6, metric=metric))  # type: ignore[operator]
    assert {each.timing for each in evals(events) if each.step == 2} == {"milestone", "immediate"}
    assert [
        each.n
        for each in evals(events)
        if (each.step, each.metric, each.timing) == (2, "efficacy", "immediate")
    ] == [2, 2]


def test_a_restrained_view_has_immediate_scores_of_its_own(world: Sequence[EditRequest]) -> None:
    events = list(
        run_edits(
            loud_run(
                world,
                protocols=("token", "distribution"),
                timings=("milestone", "immediate"),
                restraints=PRUNE,
            )
        )
    )
    for view in ("unrestrained", "prune"):
        now, then = (
            value(events, step=6, metric="locality", view=view, timing=timing)
            for timing in ("milestone", "immediate")
        )
        assert value(events, step=6, metric="locality_forgetting", view=view) == pytest.approx(
            then - now
        )  # type: ignore[operator]
    where = {
        "step": 6,
        "metric": "locality_kl_nats",
        "protocol": "distribution",
        "timing": "immediate",
    }
    assert value(events, **where) != value(events, **where, view="prune")


def test_final_is_the_last_measurement_by_its_own_name_also_where_no_milestone_is(
    world: Sequence[EditRequest],
) -> None:
    events = list(run_edits(loud_run(world, timings=("milestone", "final"))))
    last = [each for each in evals(events) if each.step == 6 and each.block is None]
    assert [with_values(each, timing="milestone") for each in last if each.timing == "final"] == [
        each for each in last if each.timing == "milestone"
    ]
    made = loud_run(world, timings=("milestone", "final"), milestones=(0, 2))
    made = dataclasses.replace(
        made, schedule=dataclasses.replace(made.schedule, measures_last=True)
    )
    events = list(run_edits(made))
    assert {each.timing for each in evals(events) if each.step == 6} == {"final"}
    assert {each.timing for each in evals(events) if each.step < 6} == {"before", "milestone"}


def test_blocks_add_up_to_the_whole_and_appear_as_edits_reach_them(
    world: Sequence[EditRequest],
) -> None:
    events = list(run_edits(loud_run(world, block_size=4, milestones=(0, 2, 5, 6))))
    found = {
        (each.step, each.block): each
        for each in evals(events)
        if each.block and each.metric == "locality" and each.protocol == "token"
    }
    assert [place for place in found if place[0]] == [
        (2, "1-4"),
        (5, "1-4"),
        (5, "5-8"),
        (6, "1-4"),
        (6, "5-8"),
    ]
    assert [found[place].n for place in ((2, "1-4"), (5, "5-8"), (6, "5-8"))] == [2, 1, 2]
    parts = [found[6, "1-4"], found[6, "5-8"]]
    together = sum(part.value * part.n for part in parts) / 6  # type: ignore[operator]
    assert value(events, step=6, metric="locality") == pytest.approx(together)


@pytest.mark.parametrize("rollback", [False, True], ids=["sequential", "rollback"])
def test_a_run_with_everything_resumed_from_any_checkpoint_is_the_uninterrupted_run(
    rollback: bool, world: Sequence[EditRequest], tmp_path: Path
) -> None:
    def made() -> Trajectory:
        return loud_run(
            world,
            protocols=ALL,
            timings=("milestone", "immediate", "final"),
            block_size=2,
            bootstrap=50,
            restraints=PRUNE,
            rollback=rollback,
            batch_size=2,
        )

    uninterrupted = list(run_edits(made()))
    for index, event in enumerate(uninterrupted):
        if not isinstance(event, RunState) or event.step == 3:
            continue
        save_state(event, tmp_path, {})
        torch.manual_seed(99)  # whatever happened in the process before
        rest = list(run_edits(made(), load_state(tmp_path)))
        assert written(rest) == written(uninterrupted[index + 1 :])
    assert isinstance(uninterrupted[-1], RunState) and uninterrupted[-1].step == 3


def test_a_block_of_a_sample_says_its_own_size_and_requests(world: Sequence[EditRequest]) -> None:
    made = loud_run(world, max_requests=3, block_size=2, milestones=(0, 6))
    made = dataclasses.replace(made, block_size=2)
    found = [
        each
        for each in evals(list(run_edits(made)))
        if each.metric == "efficacy" and each.protocol == "token" and each.block
    ]
    for each in found:
        first, last = map(int, str(each.block).split("-"))
        chosen = [position for position in made.measured(each.step) if first <= position <= last]
        assert each.n == len(chosen) and each.sampled_from == (2 if len(chosen) < 2 else None)
        assert each.requests == digest_of(made.at(chosen))
        assert made.evaluated()[each.requests] in ({"positions": chosen}, {"first": len(chosen)})
    assert len({each.block for each in found}) > 1


def test_by_prompt_too_forgetting_is_immediate_minus_now(world: Sequence[EditRequest]) -> None:
    events = list(
        run_edits(
            loud_run(
                world, timings=("milestone", "immediate"), aggregation="prompt", milestones=(0, 6)
            )
        )
    )
    for metric in ("efficacy", "generalization", "locality"):
        then, now = (
            value(events, step=6, metric=metric, timing=timing)
            for timing in ("immediate", "milestone")
        )
        assert value(events, step=6, metric=f"{metric}_forgetting") == pytest.approx(then - now)  # type: ignore[operator]


def test_a_sample_is_seeded_mostly_the_same_and_said_to_be_one(
    world: Sequence[EditRequest],
) -> None:
    made = loud_run(world, max_requests=3)
    events = list(run_edits(made))
    said = {
        each.step: (each.n, each.sampled_from, each.requests)
        for each in evals(events)
        if each.metric == "efficacy"
    }
    assert {step: each[:2] for step, each in said.items()} == {0: (3, 6), 2: (2, None), 6: (3, 6)}
    assert said[6][2] == digest_of([world[position - 1] for position in made.measured(6)])
    (sample,) = (each for digest, each in made.evaluated().items() if digest == said[6][2])
    assert (
        sample == {"positions": list(made.measured(6))}
        and {"first": 2} in made.evaluated().values()
    )
    assert made.measured(0) == made.measured(6), "before the first edit, on those to come"
    assert made.measured(6) == loud_run(world, max_requests=3).measured(6)
    many = tuple(dataclasses.replace(world[0], id=f"r/{index}") for index in range(400))
    large = dataclasses.replace(
        made,
        requests=many,
        schedule=dataclasses.replace(made.schedule, edits=400),
        max_requests=100,
    )
    assert len({*large.measured(399)} & {*large.measured(400)}) >= 99
    assert dataclasses.replace(large, seed=9).measured(400) != large.measured(400)
    assert len([position for position in large.measured(400) if position <= 200]) == pytest.approx(
        50, abs=15
    )


def test_only_what_will_be_measured_is_asked_of_the_unedited_model(
    world: Sequence[EditRequest],
) -> None:
    made = loud_run(world, max_requests=1, milestones=(0, 6))
    assert len(made.ever_measured()) == 1
    assert (
        made.ever_measured()
        != dataclasses.replace(made, timings=("milestone", "immediate")).ever_measured()
        == tuple(world)
    )
    assert loud_run(world, milestones=(6,)).ever_measured() == tuple(world)
    (state, *_) = (event for event in run_edits(made) if isinstance(event, RunState))
    assert sum(name.startswith("greedy/") for name in state.baselines["editing"]) == 1


def test_every_number_says_how_it_came_about(world: Sequence[EditRequest]) -> None:
    events = list(
        run_edits(
            loud_run(
                world,
                protocols=("argmax", "generate"),
                dataset="abc",
                aggregation="prompt",
                bootstrap=20,
            )
        )
    )
    for each in evals(events):
        assert (each.dataset, each.aggregation, each.context) == ("abc", "prompt", "{}")
        assert each.variant is None
        assert each.max_new_tokens == (3 if each.protocol == "generate" else None)
        assert each.requests and each.timing and each.protocol
        if each.value is not None and each.n > 2:
            assert each.low is not None and each.high is not None and each.low <= each.high


def test_the_last_step_is_measured_if_asked_for() -> None:
    schedule = Schedule(
        edits=5,
        batch_size=2,
        milestones=(0, 2),
        telemetry_every=9,
        checkpoint_every=9,
        measures_last=True,
    )
    assert [step for step in range(4) if schedule.is_measured(step)] == [0, 1, 3]
    assert [step for step in range(4) if schedule.is_milestone(step)] == [0, 1]
