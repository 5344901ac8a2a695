from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from editkit.editors.base import Plan, Step
from editkit.errors import ConfigError
from editkit.linalg.lowrank import LowRank, dense
from editkit.restraints.base import Norms, Restraints
from editkit.restraints.norm_cap import NormCap
from editkit.runner.loop import run_edits
from editkit.types import StepRecord
from tests.support.fakes import FakeEditor, trajectory
from tests.support.helpers import requests, tiny_model
from tests.support.methods import noise

UPDATE = LowRank(noise(6, 2, seed=0).float(), noise(10, 2, seed=1).float())
BASE = noise(6, 10, seed=2).float()
WEIGHT = 100 * BASE  # what earlier edits made of it has no say
NORMS_OF_BASE = Norms(
    sigma_max=float(torch.linalg.norm(BASE, ord=2)), frobenius=float(torch.linalg.norm(BASE))
)
NORMS = [("spectral", 2), ("frobenius", "fro")]


@pytest.mark.parametrize(("norm", "order"), NORMS)
@pytest.mark.parametrize("ratio", [0.01, 0.3])
@pytest.mark.parametrize("update", [UPDATE, UPDATE.dense()])
def test_an_update_that_is_too_long_gets_the_length_of_the_cap_and_keeps_its_direction(
    norm: Any, order: Any, ratio: float, update: Any
) -> None:
    found = NormCap(norm=norm, ratio=ratio).restrain(update, WEIGHT, NORMS_OF_BASE)
    assert type(found) is type(update)
    limit = ratio * torch.linalg.norm(BASE.double(), ord=order)
    length = torch.linalg.norm(UPDATE.dense().double(), ord=order)
    assert torch.allclose(
        dense(found).double(), UPDATE.dense().double() * limit / length, rtol=1e-5
    )


@pytest.mark.parametrize(("norm", "order"), NORMS)
def test_an_update_that_is_short_enough_is_the_very_same(norm: Any, order: Any) -> None:
    ratio = float(torch.linalg.norm(UPDATE.dense(), ord=order) / torch.linalg.norm(BASE, ord=order))
    for enough in (1.0001 * ratio, 3 * ratio, 100.0):
        assert NormCap(norm=norm, ratio=enough).restrain(UPDATE, WEIGHT, NORMS_OF_BASE) is UPDATE


@dataclass(frozen=True, kw_only=True)
class Insistent(FakeEditor):
    """Proposes the same large update at every step, along the first singular vectors of W_0."""

    def propose(self, step: Step, module: str, plan: Plan) -> LowRank:
        u_OK, _, v_KI = torch.linalg.svd(step.model.base(module))
        return LowRank(1000 * u_OK[:, :1], v_KI[:1].T.contiguous())


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_aligned_updates_add_up_along_a_line_and_do_not_grow_with_the_matrix(norm: Any) -> None:
    model, edits = tiny_model("gpt2"), 10
    asked = [replace(request, id=f"cap/{index}") for index, request in enumerate(requests(edits))]
    restraints = Restraints(updates=(NormCap(norm=norm, ratio=0.5),))
    steps = [
        each
        for each in run_edits(trajectory(model, asked, editor=Insistent(), restraints=restraints))
        if isinstance(each, StepRecord)
    ]
    for module, before in steps[0].modules.items():
        limit = 0.5 * before["sigma_max" if norm == "spectral" else "frobenius"]
        assert [step.modules[module]["update_frobenius"] for step in steps[1:]] == pytest.approx(
            [limit] * edits, rel=1e-5
        )
        assert steps[-1].modules[module]["sigma_max"] == pytest.approx(
            before["sigma_max"] + edits * limit, rel=1e-4
        )


def test_values_in_are_untouched() -> None:
    update, weight = UPDATE.dense(), WEIGHT.clone()
    NormCap(norm="frobenius", ratio=0.01).restrain(update, weight, NORMS_OF_BASE)
    assert torch.equal(update, UPDATE.dense()) and torch.equal(weight, WEIGHT)


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_an_update_that_is_not_finite_stays_as_it_is(norm: Any) -> None:
    update = torch.full((6, 10), torch.nan)
    assert NormCap(norm=norm, ratio=0.1).restrain(update, WEIGHT, NORMS_OF_BASE) is update


def test_a_ratio_of_zero_is_named() -> None:
    with pytest.raises(ConfigError, match=r"ratio: must be positive"):
        NormCap(norm="spectral", ratio=0.0)
