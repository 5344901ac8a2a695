from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from editkit.restraints.base import Restraints
from editkit.restraints.prune import Prune
from editkit.runner.checkpoint import RunState, load_state, save_state
from editkit.runner.loop import run_edits
from editkit.runner.plan import Collapse
from editkit.types import EditRequest, EvalRecord, StepRecord, as_json
from tests.support.fakes import FakeEditor, trajectory
from tests.support.helpers import tiny_model

REQUESTS = tuple(
    EditRequest(id=f"r/{index}", prompt="{} lives in", subject="Ann", target="Rome")
    for index in range(6)
)


def prune(**changes: object) -> Restraints:
    fields = {
        "function": "linear",
        "alpha": 1.2,
        "apply_at": "evaluation",
        "every": None,
        "allow_amplify": False,
    } | changes
    return Restraints(totals={"prune": Prune(**fields)})  # type: ignore[arg-type]


def records(events: list) -> list[dict]:
    """Events as they would be written, without what a clock measured."""
    return [
        {**as_json(event), "seconds": None} for event in events if not isinstance(event, RunState)
    ]


def weights(model) -> list[torch.Tensor]:
    return [model.weight(module).clone() for module in FakeEditor().modules(model)]


def test_every_step_plans_once_and_proposes_each_module_in_order_before_it_observes() -> None:
    calls: list[str] = []
    model = tiny_model("gpt2")
    list(run_edits(trajectory(model, REQUESTS[:2], editor=FakeEditor(calls=calls))))
    first, second = FakeEditor().modules(model)
    assert calls == ["plan", f"propose {first}", f"propose {second}", "observe"] * 2


def test_records_come_in_order_and_evaluations_at_milestones_alone() -> None:
    events = list(run_edits(trajectory(tiny_model("gpt2"), REQUESTS)))
    assert [event.step for event in events if isinstance(event, StepRecord)] == list(range(7))
    assert [event.step for event in events if isinstance(event, EvalRecord)] == [0, 2, 6]
    assert [event.step for event in events if isinstance(event, RunState)] == [0, 2, 4, 6]
    measured = [event for event in events if isinstance(event, EvalRecord)]
    assert [(event.measurement.timing, event.measurement.n) for event in measured] == [
        ("before", 6),
        ("milestone", 2),
        ("milestone", 6),
    ]


def test_batches_hold_every_request_once() -> None:
    events = list(
        run_edits(trajectory(tiny_model("gpt2"), REQUESTS[:5], batch_size=2, milestones=(3, 5)))
    )
    steps = [event for event in events if isinstance(event, StepRecord)]
    assert [step.requests for step in steps] == [(), ("r/0", "r/1"), ("r/2", "r/3"), ("r/4",)]
    assert [event.step for event in events if isinstance(event, EvalRecord)] == [2, 3]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj"])
def test_a_run_resumed_from_any_checkpoint_is_the_uninterrupted_run(
    kind: str, tmp_path: Path
) -> None:
    whole_model = tiny_model(kind)
    whole = list(run_edits(trajectory(whole_model, REQUESTS, restraints=prune())))
    for index, event in enumerate(whole):
        if not isinstance(event, RunState) or event.step == 6:
            continue
        save_state(event, tmp_path, {})
        model = tiny_model(kind)
        torch.manual_seed(99)  # whatever happened in the process before
        rest = list(
            run_edits(trajectory(model, REQUESTS, restraints=prune()), load_state(tmp_path))
        )
        assert records(rest) == records(whole[index + 1 :])
        assert all(
            torch.equal(a, b) for a, b in zip(weights(model), weights(whole_model), strict=True)
        )


def test_a_restrained_view_leaves_the_trajectory_alone() -> None:
    plain, viewed = tiny_model("gpt2"), tiny_model("gpt2")
    loud = FakeEditor(scale=5.0)
    without = list(run_edits(trajectory(plain, REQUESTS, editor=loud)))
    with_view = list(run_edits(trajectory(viewed, REQUESTS, editor=loud, restraints=prune())))
    assert all(torch.equal(a, b) for a, b in zip(weights(plain), weights(viewed), strict=True))
    values = {
        (event.step, event.view): event.measurement.value
        for event in with_view
        if isinstance(event, EvalRecord) and event.measurement.metric == "moved"
    }
    assert {view for _, view in values} == {"unrestrained", "prune"}
    assert values[6, "prune"] != values[6, "unrestrained"]
    module = loud.modules(viewed)[0]
    weighed = [
        event
        for event in with_view
        if isinstance(event, EvalRecord)
        and (event.measurement.task, event.measurement.metric) == (module, "sigma_max")
    ]
    last_step = [event for event in with_view if isinstance(event, StepRecord)][-1]
    assert [event.step for event in weighed] == [0, 2, 6]
    assert weighed[-1].measurement.value < last_step.modules[module]["sigma_max"]
    assert [event.measurement.value for event in without if isinstance(event, EvalRecord)] == [
        values[step, "unrestrained"] for step in (0, 2, 6)
    ]


def test_a_total_restrained_at_the_end_is_the_evaluated_view_written_into_the_model() -> None:
    loud = FakeEditor(scale=5.0)
    viewed = list(
        run_edits(trajectory(tiny_model("gpt2"), REQUESTS, editor=loud, restraints=prune()))
    )
    model = tiny_model("gpt2")
    ended = list(
        run_edits(trajectory(model, REQUESTS, editor=loud, restraints=prune(apply_at="end")))
    )
    last_view = [
        event.measurement.value
        for event in viewed
        if isinstance(event, EvalRecord)
        and (event.view, event.measurement.metric) == ("prune", "moved")
    ][-1]
    (last_end,) = [
        event
        for event in ended
        if isinstance(event, EvalRecord)
        and (event.view, event.measurement.metric) == ("prune", "moved")
    ]
    assert last_end.step == 6
    assert last_end.measurement.value == pytest.approx(last_view, rel=1e-5)
    (sigma_max,) = [
        event.measurement.value
        for event in ended
        if isinstance(event, EvalRecord)
        and event.measurement.metric == "sigma_max"
        and "h.0" in event.measurement.task
    ]
    assert sigma_max == pytest.approx(
        float(torch.linalg.matrix_norm(model.weight(loud.modules(model)[0]), 2)), rel=1e-5
    )


def test_the_last_state_keeps_the_model_from_before_a_restraint_was_put_in_at_the_end(
    tmp_path: Path,
) -> None:
    loud = FakeEditor(scale=5.0)
    free = [
        event
        for event in run_edits(trajectory(tiny_model("gpt2"), REQUESTS, editor=loud))
        if isinstance(event, RunState)
    ]
    model = tiny_model("gpt2")
    plan = trajectory(model, REQUESTS, editor=loud, restraints=prune(apply_at="end"))
    states = [event for event in run_edits(plan) if isinstance(event, RunState)]
    assert [bool(state.before_end) for state in states] == [False, False, False, True]
    save_state(states[-1], tmp_path, {})
    last = load_state(tmp_path)
    for module, total in last.before_end.items():
        assert torch.equal(total.dense(), free[-1].totals[module].dense())
        assert torch.equal(last.totals[module].dense(), model.total(module).dense())
    again = tiny_model("gpt2")
    rest = list(
        run_edits(trajectory(again, REQUESTS, editor=loud, restraints=prune(apply_at="end")), last)
    )
    assert rest == [] and all(
        torch.equal(a, b) for a, b in zip(weights(again), weights(model), strict=True)
    ), "killed before DONE"


def test_a_total_restrained_in_the_loop_changes_later_edits() -> None:
    loud = FakeEditor(scale=5.0)
    free = tiny_model("gpt2")
    list(run_edits(trajectory(free, REQUESTS, editor=loud)))
    model = tiny_model("gpt2")
    events = list(
        run_edits(
            trajectory(model, REQUESTS, editor=loud, restraints=prune(apply_at="every", every=2))
        )
    )
    assert {event.view for event in events if isinstance(event, EvalRecord)} == {"prune"}
    module = loud.modules(model)[0]
    assert model.total(module).sigma_max() < free.total(module).sigma_max()


def test_a_collapse_is_recorded_after_the_last_sound_state_and_stops_the_run() -> None:
    seen = []
    with pytest.raises(Collapse, match=r"update of .* at step 3"):
        for event in run_edits(
            trajectory(tiny_model("gpt2"), REQUESTS, editor=FakeEditor(fails_at="r/2"))
        ):
            seen.append(event)
    state, record = seen[-2:]
    assert isinstance(state, RunState) and state.step == 2
    assert record.nonfinite is not None and record.requests == ("r/2",)


def test_a_run_told_to_continue_goes_past_a_collapse_without_writing_it() -> None:
    model = tiny_model("gpt2")
    events = list(
        run_edits(
            trajectory(model, REQUESTS, editor=FakeEditor(fails_at="r/2"), on_collapse="continue")
        )
    )
    assert [
        event.step for event in events if isinstance(event, StepRecord) and event.nonfinite
    ] == [3]
    assert events[-1].step == 6
    assert all(torch.isfinite(weight).all() for weight in weights(model))


def test_a_run_that_is_asked_to_stop_yields_its_state_after_the_edit_at_hand() -> None:
    answers = iter([False, True])
    events = list(
        run_edits(
            trajectory(
                tiny_model("gpt2"),
                REQUESTS,
                checkpoint_every=100,
                should_stop=lambda: next(answers),
            )
        )
    )
    assert isinstance(events[-1], RunState)
    assert events[-1].step == max(event.step for event in events) == 2


def test_states_are_values() -> None:
    states = [
        event
        for event in run_edits(trajectory(tiny_model("gpt2"), REQUESTS))
        if isinstance(event, RunState)
    ]
    assert [max(total.rank for total in state.totals.values()) for state in states] == [0, 2, 4, 6]
    with pytest.raises(dataclasses.FrozenInstanceError):
        states[0].step = 1  # type: ignore[misc]
