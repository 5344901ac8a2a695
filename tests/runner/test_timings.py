"""When edits are measured: right after each, at milestones, at the end, alone on the unedited model
- and the same after a kill.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch

from editkit.config.schedule import Schedule
from editkit.datasets.world import WorldDataset
from editkit.evaluation.base import Moment
from editkit.evaluation.editing import EditingEvaluator
from editkit.evaluation.fluency import Fluency
from editkit.evaluation.protocols.generate import Generate
from editkit.evaluation.scoring.frozen_text import to_bytes
from editkit.evaluation.statistics.tally import Outcome, as_rows, tally
from editkit.linalg.lowrank import LowRank
from editkit.linalg.total import Total
from editkit.restraints.base import AbstractTotalRestraint, Restraints
from editkit.restraints.prune import Prune
from editkit.runner.checkpoint import RunState, load_state, save_state
from editkit.runner.loop import run_edits
from editkit.runner.plan import Trajectory, digest_of
from editkit.types import EditRequest, EvalRecord, Measurement, SampleRecord, StepRecord, as_json
from tests.support.fakes import FakeEditor, SumOfWeights, trajectory
from tests.support.helpers import tiny_model
from tests.support.records import flat

ALL: tuple[str, ...] = ("probability", "argmax", "token", "generate", "distribution")
PRUNE = Restraints(
    totals={
        "prune": Prune(
            function="linear", alpha=1.2, apply_at="evaluation", every=None, allow_amplify=False
        )
    }
)
LOUD = FakeEditor(scale=1.0)
EFFICACY, LOCALITY = "efficacy", "locality"


@pytest.fixture(scope="module")
def world() -> tuple[EditRequest, ...]:
    return tuple(WorldDataset(name="world", world_seed=0, order="file", limit=6).load(0).requests)


def job(
    requests: Sequence[EditRequest],
    *,
    protocols: tuple[str, ...] = ("argmax", "token"),
    **changes: Any,
) -> Trajectory:
    """A run of loud random edits, judged by the real evaluator."""
    options = {
        name: changes.pop(name)
        for name in ("block_size", "bootstrap", "aggregation")
        if name in changes
    }
    evaluator = EditingEvaluator(
        protocols=protocols, tokens_per_batch=512, generate=Generate(max_new_tokens=3), **options
    )
    plan = {
        name: changes.pop(name)
        for name in ("milestones", "batch_size", "restraints", "editor", "checkpoint_every")
        if name in changes
    }
    model = changes.pop("model", None) or tiny_model("gpt2")
    made = trajectory(model, requests, **({"editor": LOUD, "milestones": (0, 2, 6)} | plan))
    return dataclasses.replace(made, evaluators={"editing": evaluator}, **changes)


def evals(events: Sequence[object]) -> list[Any]:
    """The editing measurements of a run, with the keys of their lines as attributes."""
    records = [flat(event) for event in events if isinstance(event, EvalRecord)]
    return [record for record in records if record.kind == "editing"]


def value(events: Sequence[object], **where: object) -> float | None:
    """The one number of these fields; fields that are not given must be None."""
    wanted = {
        "view": "unrestrained",
        "task": None,
        "block": None,
        "subset": None,
        "timing": "milestone",
        "protocol": "token",
    } | where
    (found,) = (
        each
        for each in evals(events)
        if all(getattr(each, name) == given for name, given in wanted.items())
    )
    return found.value


def with_values(record: Any, **values: object) -> Any:
    return SimpleNamespace(**vars(record) | values)


def whole(found: Sequence[Any]) -> dict[tuple[str | None, str], float]:
    """What an evaluator measured over all requests and kinds."""
    return {
        (each.protocol, each.metric): each.value
        for each in found
        if each.subset is None and each.block is None and each.task is None
    }


def written(events: Sequence[object]) -> list[dict[str, Any]]:
    """Records as they would be written, without what a clock measured."""
    return [
        {"rows": [dict(row) for row in event.rows], "step": event.step, "view": event.view}
        if isinstance(event, SampleRecord)
        else {**as_json(event), "seconds": None}
        for event in events
        if isinstance(event, SampleRecord | EvalRecord | StepRecord)
    ]


def test_immediate_scores_are_those_of_stopping_after_each_edit(
    world: Sequence[EditRequest],
) -> None:
    events = list(run_edits(job(world, timings=("milestone", "immediate"))))
    plain = job(world, milestones=())
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
            job(
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
    events = list(run_edits(job(world, timings=("milestone", "final"))))
    last = [each for each in evals(events) if each.step == 6 and each.block is None]
    assert [with_values(each, timing="milestone") for each in last if each.timing == "final"] == [
        each for each in last if each.timing == "milestone"
    ]
    made = job(world, timings=("milestone", "final"), milestones=(0, 2))
    made = dataclasses.replace(
        made, schedule=dataclasses.replace(made.schedule, measures_last=True)
    )
    events = list(run_edits(made))
    assert {each.timing for each in evals(events) if each.step == 6} == {"final"}
    assert {each.timing for each in evals(events) if each.step < 6} == {"before", "milestone"}


def test_blocks_add_up_to_the_whole_and_appear_as_edits_reach_them(
    world: Sequence[EditRequest],
) -> None:
    events = list(run_edits(job(world, block_size=4, milestones=(0, 2, 5, 6))))
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
        return job(
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


def test_with_rollback_each_batch_is_measured_alone_on_the_unedited_model(
    world: Sequence[EditRequest],
) -> None:
    quiet = FakeEditor(scale=1.0)
    made = job(world, rollback=True, batch_size=2, editor=quiet)
    before = {module: made.model.weight(module).clone() for module in quiet.modules(made.model)}
    expected = []
    for event in run_edits(made):
        if isinstance(event, StepRecord) and event.step:
            # What was written is this batch's own update: nothing of the batches before it is left.
            assert all(made.model.total(module).rank == 1 for module in before)
            assert not all(
                torch.equal(made.model.weight(module), before[module]) for module in before
            )
            evaluator, batch = (
                made.evaluators["editing"],
                world[2 * event.step - 2 : 2 * event.step],
            )
            baseline = evaluator.baseline(tiny_model("gpt2"), world)
            found = evaluator.evaluate(made.model, batch, baseline)
            expected.append(
                {
                    (each.protocol, each.metric): each.value
                    for each in found
                    if getattr(each, "subset", 1) is None and not each.task
                }
            )
    events = list(run_edits(job(world, rollback=True, batch_size=2, editor=quiet)))
    for step, of_batch in enumerate(expected, start=1):
        block = f"{2 * step - 1}-{2 * step}"
        assert value(
            events, step=step, metric="locality", timing="rollback", block=block
        ) == pytest.approx(of_batch["token", "locality"])
    mean = sum(each["token", "locality"] for each in expected) / len(expected)
    assert value(events, step=3, metric="locality", timing="rollback") == pytest.approx(mean)
    assert {each.timing for each in evals(events)} == {"before", "rollback"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TakesSomeBack(AbstractTotalRestraint):
    """Takes back a total whose first entry is positive, and leaves the others alone."""

    apply_at: Literal["evaluation"] = "evaluation"
    every: None = None

    def check(self, base_sigma_max: Mapping[str, float]) -> list[str]:
        return []

    def correction(self, total: Total, base_sigma_max: float) -> LowRank | None:
        u_OK, s_K, v_IK = total.svd()
        return LowRank(-u_OK * s_K, v_IK) if total.dense()[0, 0] > 0 else None


def test_with_rollback_a_view_keeps_its_own_notes_also_where_the_last_batch_needs_no_correction(
    world: Sequence[EditRequest],
) -> None:
    view = Restraints(totals={"some": TakesSomeBack()})
    made = job(
        world,
        rollback=True,
        batch_size=2,
        milestones=(2, 4, 6),
        restraints=view,
        protocols=("distribution",),
    )
    events = list(run_edits(made))
    where = {"metric": "locality_kl_nats", "protocol": "distribution", "timing": "rollback"}
    alone = {
        name: [
            value(events, step=step, block=f"{2 * step - 1}-{2 * step}", view=name, **where)
            for step in (1, 2, 3)
        ]
        for name in ("unrestrained", "some")
    }
    is_same = [one == other for one, other in zip(*alone.values(), strict=True)]
    assert (False, True) in itertools.pairwise(is_same), (
        "a batch that needs no correction behind one that does"
    )
    for name, scores in alone.items():
        for step in (1, 2, 3):
            assert value(events, step=step, view=name, **where) == pytest.approx(
                sum(scores[:step]) / step
            )


@pytest.mark.parametrize(
    ("timings", "asked"), [(("milestone",), 3), (("milestone", "immediate"), 6)]
)
def test_a_view_that_corrects_nothing_is_asked_again_only_where_it_has_notes(
    timings: tuple[str, ...],
    asked: int,
    world: Sequence[EditRequest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    measure = EditingEvaluator.measure

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return measure(*arguments)

    monkeypatch.setattr(EditingEvaluator, "measure", counted)
    events = list(
        run_edits(
            job(
                world,
                timings=timings,
                restraints=PRUNE,
                editor=FakeEditor(scale=1e-6),
                protocols=("token",),
            )
        )
    )
    assert len(calls) == asked
    own, prune = (
        [each for each in evals(events) if each.view == view] for view in ("unrestrained", "prune")
    )
    assert [with_values(each, view="prune") for each in own] == prune


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ability(SumOfWeights):
    """Something that asks the model and no edit, as tasks and perplexity do."""

    def evaluate(
        self, model: Any, requests: Sequence[EditRequest], baseline: Any
    ) -> list[Measurement]:
        (found,) = super().evaluate(model, requests, baseline)
        return [dataclasses.replace(found, kind="downstream", protocol=None, task="ability")]


def test_with_rollback_whatever_takes_no_notes_is_of_the_last_batch_and_says_so(
    world: Sequence[EditRequest],
) -> None:
    made = job(world, rollback=True, batch_size=2, milestones=(0, 4))
    module = LOUD.modules(made.model)[0]
    made = dataclasses.replace(
        made, evaluators={"ability": Ability(module=module), "fake": SumOfWeights(module=module)}
    )
    found = [flat(event) for event in run_edits(made) if isinstance(event, EvalRecord)]
    ability, edits = (
        [each for each in found if each.kind == kind] for kind in ("downstream", "editing")
    )
    last_batch = digest_of(world[2:4])
    assert [(each.step, each.timing, each.requests) for each in ability] == [
        (0, None, None),
        (2, "rollback", last_batch),
    ]
    assert made.evaluated()[last_batch] == {"positions": [3, 4]}
    assert [(each.step, each.timing, each.block, each.n) for each in edits] == [
        (0, "before", None, 6),
        (2, "rollback", "3-4", 2),
    ]


def test_with_rollback_texts_are_written_while_their_batch_is_in_the_model(
    world: Sequence[EditRequest],
) -> None:
    fluency = Fluency(limit=3, max_tokens=16, top_k=5, seed=0)

    def made() -> Trajectory:
        return dataclasses.replace(
            job(world, rollback=True, batch_size=2, milestones=(0, 6)),
            evaluators={"fluency": fluency},
        )

    model, expected = made().model, []
    baseline = fluency.baseline(model, world)
    for event in run_edits(dataclasses.replace(made(), model=model, evaluators={})):
        if isinstance(event, StepRecord) and event.step in (1, 2):
            rows = fluency.evaluate(
                model,
                world[2 * event.step - 2 : 2 * event.step][: 3 - 2 * (event.step - 1)],
                baseline,
            )[-1]
            expected += [row["texts"] for row in rows.rows]  # type: ignore[union-attr]
    events = list(run_edits(made()))
    (last,) = (event for event in events if isinstance(event, SampleRecord) and event.step)
    assert [row["texts"] for row in last.rows] == expected and len(expected) == 3
    bits = [each for each in evals(events) if each.metric == "fluency_bits"]
    told = [(each.step, each.timing, each.block, each.n) for each in bits]
    assert told == [
        (0, "before", None, 3),
        (1, "rollback", "1-2", 2),
        (2, "rollback", "3-4", 1),
        (3, "rollback", None, 3),
    ]
    assert bits[1].requests == digest_of(world[:2])
    sequential = dataclasses.replace(made(), rollback=False, timings=("milestone", "immediate"))
    (*_, state) = (event for event in run_edits(sequential) if isinstance(event, RunState))
    assert state.baselines["fluency"].keys() == {"tf_idf"} and not state.notes, (
        "texts cost too much to be written after every edit"
    )


def test_rollback_tells_generations_and_parts_as_other_runs_do(
    world: Sequence[EditRequest],
) -> None:
    changes: dict[str, Any] = {"protocols": ("token", "generate"), "milestones": (0, 1)}
    alone, sequential = (
        list(run_edits(job(world[:1], rollback=rollback, **changes))) for rollback in (True, False)
    )

    def told(events: Sequence[object]) -> list[EvalRecord]:
        return [with_values(each, timing=None) for each in evals(events) if each.step]

    assert told(alone) == told(sequential), "one edit is the same either way"
    rows = [
        [sorted(map(str, event.rows)) for event in events if isinstance(event, SampleRecord)]
        for events in (alone, sequential)
    ]
    assert len(rows[0]) == 2 and rows[0] == rows[1]
    noted = {EFFICACY: [1.0, 0.0, 1.0], LOCALITY: [0.5, 1.0, 1.0]}
    evaluator = EditingEvaluator(protocols=("token",), tokens_per_batch=512)
    baseline: dict[str, torch.Tensor] = {"ids": to_bytes([each.id for each in world[:3]])}
    notes: dict[str, torch.Tensor] = {}
    for metric, scores in noted.items():
        key, first = f"token/{metric}/", [1.0, 0.0, 0.0]
        notes[f"noted/v/{key}"] = as_rows([tally([Outcome(score)]) for score in scores])
        baseline[f"before/{key}"] = as_rows([tally([Outcome(score)]) for score in first])
    found = evaluator.noted(
        world[:3], baseline, notes, Moment(view="v", positions=(1, 2, 3)), timing="rollback"
    )
    parts = {
        (each.metric, each.subset): each.value for each in found if isinstance(each, Measurement)
    }
    assert (
        parts[LOCALITY, "succeeded"] == 0.75
        and parts[EFFICACY, "known_before"] == 1.0
        and parts[EFFICACY, "unknown_before"] == 0.5
    )
    assert {each.timing for each in found if isinstance(each, Measurement)} == {"rollback"}


def test_with_rollback_nothing_that_was_measured_is_left_out_of_a_sample(
    world: Sequence[EditRequest],
) -> None:
    made = job(world, rollback=True, max_requests=2)
    assert made.measured(6) == (1, 2, 3, 4, 5, 6)
    assert {
        (each.n, each.sampled_from)
        for each in evals(list(run_edits(made)))
        if each.metric == "efficacy" and not each.subset
    } >= {(6, None)}


def test_a_block_of_a_sample_says_its_own_size_and_requests(world: Sequence[EditRequest]) -> None:
    made = job(world, max_requests=3, block_size=2, milestones=(0, 6))
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
            job(world, timings=("milestone", "immediate"), aggregation="prompt", milestones=(0, 6))
        )
    )
    for metric in ("efficacy", "generalization", "locality"):
        then, now = (
            value(events, step=6, metric=metric, timing=timing)
            for timing in ("immediate", "milestone")
        )
        assert value(events, step=6, metric=f"{metric}_forgetting") == pytest.approx(then - now)  # type: ignore[operator]


def test_editors_start_anew_with_rollback(world: Sequence[EditRequest]) -> None:
    steps = [
        event for event in run_edits(job(world, rollback=True)) if isinstance(event, StepRecord)
    ]
    assert [step.target["loss"] for step in steps[1:]] == [0.0] * 6, (
        "the requests that the editor has seen before"
    )
    steps = [event for event in run_edits(job(world)) if isinstance(event, StepRecord)]
    assert [step.target["loss"] for step in steps[1:]] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_a_sample_is_seeded_mostly_the_same_and_said_to_be_one(
    world: Sequence[EditRequest],
) -> None:
    made = job(world, max_requests=3)
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
    assert made.measured(6) == job(world, max_requests=3).measured(6)
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
    made = job(world, max_requests=1, milestones=(0, 6))
    assert len(made.ever_measured()) == 1
    assert (
        made.ever_measured()
        != dataclasses.replace(made, timings=("milestone", "immediate")).ever_measured()
        == tuple(world)
    )
    assert job(world, milestones=(6,)).ever_measured() == tuple(world)
    (state, *_) = (event for event in run_edits(made) if isinstance(event, RunState))
    assert sum(name.startswith("greedy/") for name in state.baselines["editing"]) == 1


def test_every_number_says_how_it_came_about(world: Sequence[EditRequest]) -> None:
    events = list(
        run_edits(
            job(
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
