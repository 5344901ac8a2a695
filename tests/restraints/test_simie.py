from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.errors import OptionError
from editkit.restraints.base import Restraints
from editkit.restraints.simie import SimIE
from editkit.runner.loop import run_edits
from editkit.stats.least_squares import LeastSquares
from tests.support.fakes import trajectory
from tests.support.helpers import requests, tiny_model
from tests.support.methods import (
    memit,
    model_moments,
    moments_of,
    noise,
    relative,
    second_moment,
)

ROWS, SIZE, WEIGHT, RIDGE = 10, 32, 2.0, 0.7
C, W_0 = second_moment(SIZE, seed=3), noise(ROWS, SIZE, seed=9)
BATCHES = [(noise(SIZE, n, seed=i), noise(ROWS, n, seed=50 + i)) for i, n in enumerate((1, 3, 12))]


def test_the_merged_matrix_is_the_published_recursion_over_edits_of_w_0() -> None:
    restraint, moments = SimIE(ridge=RIDGE), moments_of({"m": C})
    state, total = restraint.init(None, moments), torch.zeros_like(W_0)  # type: ignore[arg-type]
    merged, p = W_0.clone(), RIDGE * torch.eye(SIZE).double()
    for keys, residuals in BATCHES:
        alone = W_0 + residuals @ keys.T @ torch.linalg.inv(WEIGHT * C + keys @ keys.T)
        p = p + keys @ keys.T
        merged = merged + (alone - merged) @ keys @ keys.T @ torch.linalg.inv(p)
        asked = LeastSquares(
            module="m",
            keys_IN=keys,
            residuals_ON=residuals - total @ keys,  # as the step passes them on W_0
            weight=WEIGHT,
            total=lambda columns, total=total: total @ columns,  # type: ignore[misc]
        )
        update = restraint.solve(asked, state, moments)
        total = total + update.dense()
        state = restraint.observe(asked, state, moments)
        assert relative(W_0 + total, merged) < 1e-6


def test_a_first_edit_with_a_small_ridge_does_at_its_keys_what_memit_does() -> None:
    model, [asked] = tiny_model("gpt2"), requests(1)
    editor = memit(layers=(1,), target={"steps": 3})
    moments = model_moments(model, editor.modules(model))
    job = replace(
        trajectory(model, [asked], editor=editor, milestones=()),
        restraints=Restraints(solve=SimIE(ridge=1e-9)),
        moments=moments,
    )
    list(run_edits(job))
    (module,) = editor.modules(model)
    total = model.total(module).dense()
    plain = tiny_model("gpt2")
    alone = replace(job, model=plain, restraints=Restraints())
    list(run_edits(alone))
    wanted = plain.total(module).dense()
    direction = torch.linalg.svd(total.double()).Vh[0]
    assert relative(total.double() @ direction, wanted.double() @ direction) < 1e-4


def test_a_ridge_that_is_not_positive_is_refused() -> None:
    with pytest.raises(OptionError, match="ridge: must be positive"):
        SimIE(ridge=0)
