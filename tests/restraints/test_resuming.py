"""A run with each restraint that is stopped after two of four edits, and resumed from its checkpoint
file, has the bits of a whole one: totals, the restraint's state, and the records.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.restraints.alphaedit import AlphaEdit
from editkit.restraints.base import AbstractRestraint, Restraints
from editkit.restraints.d4s import D4S
from editkit.restraints.emmet import EmmetConstraint
from editkit.restraints.encore import Encore
from editkit.restraints.lyaplock import LyapLock
from editkit.restraints.mose import Mose
from editkit.restraints.mpes import Mpes
from editkit.restraints.nas import Nas
from editkit.restraints.nse import Nse
from editkit.restraints.rect import Rect
from editkit.restraints.simie import SimIE
from editkit.restraints.sphere import Sphere
from editkit.runner.checkpoint import RunState, read_checkpoint, write_checkpoint
from editkit.runner.loop import run_edits
from editkit.types import StepRecord
from tests.support.fakes import trajectory
from tests.support.helpers import requests, tiny_model
from tests.support.methods import memit, model_moments

RESTRAINTS: dict[str, AbstractRestraint] = {
    "alphaedit": AlphaEdit(threshold=2.0, threshold_unit="relative", l2=1.0),
    "d4s": D4S(base="unedited"),
    "emmet": EmmetConstraint(relaxation=0.1),
    "encore": Encore(frobenius=0.1),
    "lyaplock": LyapLock(alpha=1.0),  # its queue grows from the second edit on
    "mose": Mose(),
    "mpes": Mpes(times=2),
    "nas": Nas(norm=1.0, variant="paper"),
    "nse": Nse(share=0.7, base="trajectory"),
    "rect": Rect(keep=0.4, epsilon=1e-8),
    "simie": SimIE(ridge=0.1),
    "sphere": Sphere(energy=0.5, alpha=0.8),
}
STATEFUL = {"alphaedit", "d4s", "encore", "lyaplock", "nse", "simie"}


def last_of(events: list[Any]) -> RunState:
    return next(event for event in reversed(events) if isinstance(event, RunState))


def figures(events: list[Any]) -> list[Any]:
    return [replace(event, seconds={}) for event in events if isinstance(event, StepRecord)]


@pytest.mark.parametrize("name", RESTRAINTS)
def test_a_run_stopped_after_two_edits_and_resumed_has_the_bits_of_a_whole_one(
    name: str, tmp_path: Path
) -> None:
    def job(stops_after: int | None = None) -> Any:
        model, editor = tiny_model("gpt2"), memit(layers=(0, 1), target={"steps": 3})
        asked = [replace(each, id=f"r/{index}") for index, each in enumerate(requests(4))]
        done = itertools.count(1)
        made = trajectory(
            model,
            asked,
            editor=editor,
            restraints=Restraints.by_place({name: RESTRAINTS[name]}),
            milestones=(),
            checkpoint_every=100,
            should_stop=lambda: next(done) == stops_after,
        )
        return replace(made, moments=model_moments(model, editor.modules(model)))

    whole, stopped = list(run_edits(job())), list(run_edits(job(stops_after=2)))
    state = last_of(stopped)
    assert state.step == 2
    assert bool(state.solve) == (name in STATEFUL)
    write_checkpoint(state.checkpoint({}), tmp_path)
    saved = read_checkpoint(tmp_path)
    assert saved is not None
    rest = list(run_edits(job(), RunState.from_checkpoint(saved)))
    wanted, found = last_of(whole), last_of(rest)
    assert found.step == wanted.step == 4
    for module, total in wanted.totals.items():
        assert not total.is_zero
        assert torch.equal(found.totals[module].dense(), total.dense())
    assert found.solve.keys() == wanted.solve.keys()
    for key, tensor in wanted.solve.items():
        assert torch.equal(found.solve[key], tensor), key
    assert figures([*stopped, *rest]) == figures(whole)
