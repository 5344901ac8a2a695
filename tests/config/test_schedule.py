from __future__ import annotations

from editkit.config.schedule import Schedule


def schedule(**changes: object) -> Schedule:
    fields = {
        "edits": 10,
        "batch_size": 4,
        "milestones": (0, 5, 10),
        "telemetry_every": 1,
        "checkpoint_every": 2,
    } | changes
    return Schedule(**fields)  # type: ignore[arg-type]


def test_the_last_batch_may_be_smaller() -> None:
    assert schedule().last_step == 3
    assert [schedule().edits_at(step) for step in range(4)] == [0, 4, 8, 10]


def test_a_milestone_falls_on_the_first_step_that_holds_its_edits() -> None:
    assert [step for step in range(4) if schedule().is_milestone(step)] == [0, 2, 3]


def test_the_last_step_always_has_telemetry_and_a_checkpoint() -> None:
    rare = schedule(telemetry_every=100, checkpoint_every=100, milestones=(5,))
    assert [step for step in range(4) if rare.has_telemetry(step)] == [0, 2, 3]
    assert [step for step in range(4) if rare.has_checkpoint(step)] == [0, 3]
