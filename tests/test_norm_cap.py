from __future__ import annotations

from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.linalg.lowrank import LowRank, dense
from editkit.restraints.norm_cap import NormCap
from tests.methods import noise

UPDATE = LowRank(noise(6, 2, seed=0).float(), noise(10, 2, seed=1).float())
WEIGHT = noise(6, 10, seed=2).float()
NORMS = [("spectral", 2), ("frobenius", "fro")]


@pytest.mark.parametrize(("norm", "order"), NORMS)
@pytest.mark.parametrize("ratio", [0.01, 0.3])
@pytest.mark.parametrize("update", [UPDATE, UPDATE.dense()])
def test_an_update_that_is_too_long_gets_the_length_of_the_cap_and_keeps_its_direction(
    norm: Any, order: Any, ratio: float, update: Any
) -> None:
    found = NormCap(norm=norm, ratio=ratio).restrain(update, WEIGHT)
    assert type(found) is type(update)
    limit = ratio * torch.linalg.norm(WEIGHT.double(), ord=order)
    length = torch.linalg.norm(UPDATE.dense().double(), ord=order)
    assert torch.allclose(dense(found).double(), UPDATE.dense().double() * limit / length, rtol=1e-5)


@pytest.mark.parametrize(("norm", "order"), NORMS)
def test_an_update_that_is_short_enough_is_the_very_same(norm: Any, order: Any) -> None:
    ratio = float(torch.linalg.norm(UPDATE.dense(), ord=order) / torch.linalg.norm(WEIGHT, ord=order))
    for enough in (1.0001 * ratio, 3 * ratio, 100.0):
        assert NormCap(norm=norm, ratio=enough).restrain(UPDATE, WEIGHT) is UPDATE


def test_values_in_are_untouched() -> None:
    update, weight = UPDATE.dense(), WEIGHT.clone()
    NormCap(norm="frobenius", ratio=0.01).restrain(update, weight)
    assert torch.equal(update, UPDATE.dense()) and torch.equal(weight, WEIGHT)


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_an_update_that_is_not_finite_stays_as_it_is(norm: Any) -> None:
    update = torch.full((6, 10), torch.nan)
    assert NormCap(norm=norm, ratio=0.1).restrain(update, WEIGHT) is update


def test_a_ratio_of_zero_is_named() -> None:
    with pytest.raises(ConfigError, match=r"norm_cap\.ratio"):
        NormCap(norm="spectral", ratio=0.0)
