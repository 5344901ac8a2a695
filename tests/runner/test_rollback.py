"""Runs with rollback: each batch is measured alone, on the unedited model with this batch's edits."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
import torch

from editkit.evaluation.base import Moment
from editkit.evaluation.editing import EditingEvaluator
from editkit.evaluation.fluency import Fluency
from editkit.evaluation.scoring.frozen_text import to_bytes
from editkit.evaluation.statistics.tally import Outcome, as_rows, tally
from editkit.linalg.lowrank import LowRank
from editkit.linalg.total import Total
from editkit.restraints.base import AbstractTotalRestraint, Restraints
from editkit.runner.checkpoint import RunState
from editkit.runner.loop import run_edits
from editkit.runner.plan import Trajectory, digest_of
from editkit.types import EditRequest, EvalRecord, Measurement, SampleRecord, StepRecord
from tests.support.fakes import FakeEditor, SumOfWeights
from tests.support.helpers import tiny_model, world_requests
from tests.support.records import flat
from tests.support.timings import (
    EFFICACY,
    LOCALITY,
    LOUD,
    PRUNE,
    evals,
    loud_run,
    value,
    with_values,
)


@pytest.fixture(scope="module")
def world() -> tuple[EditRequest, ...]:
    return world_requests(6)


def test_with_rollback_each_batch_is_measured_alone_on_the_unedited_model(
    world: Sequence[EditRequest],
) -> None:
    quiet = FakeEditor(scale=1.0)
    made = loud_run(world, rollback=True, batch_size=2, editor=quiet)
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
    events = list(run_edits(loud_run(world, rollback=True, batch_size=2, editor=quiet)))
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
    made = loud_run(
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
            loud_run(
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
    made = loud_run(world, rollback=True, batch_size=2, milestones=(0, 4))
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
            loud_run(world, rollback=True, batch_size=2, milestones=(0, 6)),
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
        list(run_edits(loud_run(world[:1], rollback=rollback, **changes)))
        for rollback in (True, False)
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
    made = loud_run(world, rollback=True, max_requests=2)
    assert made.measured(6) == (1, 2, 3, 4, 5, 6)
    assert {
        (each.n, each.sampled_from)
        for each in evals(list(run_edits(made)))
        if each.metric == "efficacy" and not each.subset
    } >= {(6, None)}


def test_editors_start_anew_with_rollback(world: Sequence[EditRequest]) -> None:
    steps = [
        event
        for event in run_edits(loud_run(world, rollback=True))
        if isinstance(event, StepRecord)
    ]
    assert [step.target["loss"] for step in steps[1:]] == [0.0] * 6, (
        "the requests that the editor has seen before"
    )
    steps = [event for event in run_edits(loud_run(world)) if isinstance(event, StepRecord)]
    assert [step.target["loss"] for step in steps[1:]] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
