"""What evaluators note right after each edit: a run's state keeps it apart from the baselines, and
checkpoints of earlier versions, which kept both together, still resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from editkit.evaluation.editing import EditingEvaluator
from editkit.evaluation.fluency import Fluency
from editkit.evaluation.values import Values
from editkit.runner.checkpoint import Checkpoint, RunState
from editkit.runner.loop import run_edits
from editkit.runner.plan import Trajectory
from editkit.types import EditRequest, EvalRecord, SampleRecord, as_json
from tests.support.fakes import FakeEditor, trajectory
from tests.support.helpers import tiny_model, world_requests


@pytest.fixture(scope="module")
def world() -> tuple[EditRequest, ...]:
    return world_requests(4)


def noting(requests: Sequence[EditRequest], *, rollback: bool) -> Trajectory:
    """A run with every evaluator that notes edits."""
    plain = trajectory(
        tiny_model("gpt2"), requests, editor=FakeEditor(scale=1.0), milestones=(0, 4)
    )
    return dataclasses.replace(
        plain,
        timings=("milestone", "immediate"),
        rollback=rollback,
        evaluators={
            "editing": EditingEvaluator(protocols=("token", "generate"), tokens_per_batch=512),
            "fluency": Fluency(limit=2, max_tokens=12, top_k=5, seed=0),
            "suite": Values(name="values", count=2, every=1),
        },
    )


def states(events: Sequence[object]) -> list[RunState]:
    return [event for event in events if isinstance(event, RunState)]


def told(events: Sequence[object]) -> list[object]:
    return [
        event if isinstance(event, SampleRecord) else as_json(event)
        for event in events
        if isinstance(event, EvalRecord | SampleRecord)
    ]


def as_before(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint as earlier versions wrote it: notes among the baselines."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensors in checkpoint.groups.items():
        groups.setdefault(name.replace("notes/", "baseline/"), {}).update(tensors)
    return dataclasses.replace(checkpoint, groups=groups)


@pytest.mark.parametrize("rollback", [False, True])
def test_a_checkpoint_that_keeps_notes_among_the_baselines_resumes_in_the_same_bits(
    world: Sequence[EditRequest], rollback: bool
) -> None:
    events = list(run_edits(noting(world, rollback=rollback)))
    (middle,) = (state for state in states(events) if state.step == 2)
    former = as_before(middle.checkpoint({}))
    assert not any(name.startswith("notes/") for name in former.groups)
    read = RunState.from_checkpoint(former)
    for kept, expected in ((read.baselines, middle.baselines), (read.notes, middle.notes)):
        assert kept.keys() == expected.keys()
        for name, tensors in expected.items():
            assert kept[name].keys() == tensors.keys()
            assert all(torch.equal(kept[name][key], tensors[key]) for key in tensors)
    resumed = list(run_edits(noting(world, rollback=rollback), read))
    later = events[events.index(middle) + 1 :]
    assert told(resumed) == told(later) and len(told(resumed)) > 10


def test_baselines_do_not_change_after_the_unedited_model(world: Sequence[EditRequest]) -> None:
    first, *others = states(list(run_edits(noting(world, rollback=True))))
    assert not first.notes
    for state in others:
        assert all(state.baselines[name] is first.baselines[name] for name in first.baselines)
        assert state.notes.keys() == {"editing", "fluency", "suite"}


def test_a_checkpoint_without_notes_has_no_group_for_them(world: Sequence[EditRequest]) -> None:
    run = dataclasses.replace(noting(world, rollback=False), timings=("milestone",))
    *_, last = states(list(run_edits(run)))
    assert not last.notes
    assert not any(name.startswith("notes/") for name in last.checkpoint({}).groups)
