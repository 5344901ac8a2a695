"""Runs with a fake editor whose measurements at every timing are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from editkit.evaluation.editing import EditingEvaluator
from editkit.evaluation.protocols.generate import Generate
from editkit.restraints.base import Restraints
from editkit.restraints.prune import Prune
from editkit.runner.plan import Trajectory
from editkit.types import EditRequest, EvalRecord, SampleRecord, StepRecord, as_json
from tests.support.fakes import FakeEditor, trajectory
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


EFFICACY = "efficacy"


LOCALITY = "locality"


def loud_run(
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
