from __future__ import annotations

import pytest
import torch

from editkit.errors import ConfigError
from editkit.linalg.lowrank import LowRank
from editkit.restraints.base import Norms
from editkit.restraints.rect import Rect
from tests.support.methods import noise

UPDATE = LowRank(noise(6, 2, seed=0).float(), noise(10, 2, seed=1).float())
WEIGHT = noise(6, 10, seed=2).float()
NORMS = Norms(sigma_max=1.0, frobenius=1.0)  # it does not look at them


def rect(keep: float = 0.2, epsilon: float = 1e-8) -> Rect:
    return Rect(keep=keep, epsilon=epsilon)


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.4, 1.0])
def test_the_largest_relative_changes_stay_as_they_are_and_nothing_else_does(keep: float) -> None:
    dense = UPDATE.dense()
    ranked = sorted(
        range(60),
        key=lambda index: (
            -abs(float(dense.flatten()[index])) / (abs(float(WEIGHT.flatten()[index])) + 1e-8)
        ),
    )
    expected = torch.zeros(60)
    for index in ranked[: max(1, round(keep * 60))]:
        expected[index] = dense.flatten()[index]
    assert torch.equal(rect(keep).restrain(UPDATE, WEIGHT, NORMS), expected.view(6, 10))


def test_a_factored_update_fares_as_its_dense_twin() -> None:
    assert torch.equal(
        rect().restrain(UPDATE, WEIGHT, NORMS), rect().restrain(UPDATE.dense(), WEIGHT, NORMS)
    )


def test_values_in_are_untouched_and_shared_with_nobody() -> None:
    dense, weight = UPDATE.dense(), WEIGHT.clone()
    kept = dense.clone()
    for keep in (0.2, 1.0):
        rect(keep).restrain(dense, weight, NORMS).add_(1)
    assert torch.equal(dense, kept) and torch.equal(weight, WEIGHT)


def test_what_it_keeps_it_keeps_again() -> None:
    once = rect().restrain(UPDATE, WEIGHT, NORMS)
    assert torch.equal(rect().restrain(once, WEIGHT, NORMS), once)


def test_a_weight_of_zero_or_minus_epsilon_counts_as_a_large_change() -> None:
    weight = torch.full((1, 10), 1.0)
    weight[0, 3], weight[0, 7] = 0.0, -1e-8
    found = rect().restrain(torch.full((1, 10), 0.1), weight, NORMS)
    assert found.nonzero()[:, 1].tolist() == [3, 7]


def test_a_half_precision_weight_is_compared_in_float32() -> None:
    assert rect().restrain(UPDATE, WEIGHT.bfloat16(), NORMS).dtype == torch.float32


def test_an_update_that_is_not_finite_stays_so() -> None:
    update = UPDATE.dense()
    update[0, 0] = torch.nan
    assert not torch.isfinite(rect().restrain(update, WEIGHT, NORMS)).all()


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match=r"keep:(.|\n)*epsilon:"):
        Rect(keep=20, epsilon=0)
