from __future__ import annotations

import math

import pytest
import torch

from editkit.errors import OptionError
from editkit.linalg.lowrank import LowRank
from editkit.restraints.lyaplock import LyapLock
from editkit.stats.least_squares import LeastSquares
from tests.support.methods import Edited, moments_of, noise, relative, second_moment

ROWS, SIZE, WEIGHT = 10, 32, 2.0
C, W_0 = second_moment(SIZE, seed=3), noise(ROWS, SIZE, seed=9)
BATCHES = [(noise(SIZE, 2 + i % 3, seed=i), noise(ROWS, 2 + i % 3, seed=50 + i)) for i in range(14)]


def edited(alpha: float) -> Edited:
    return Edited(LyapLock(alpha=alpha), moments_of({"m": C}), WEIGHT, W_0)


def published(alpha: float) -> list[tuple[torch.Tensor, float]]:
    """The update of each batch with a Z of the published formulas, from dense matrices."""
    weights, found = W_0.clone(), []
    history, outputs = torch.zeros(SIZE, SIZE).double(), torch.zeros(ROWS, SIZE).double()
    length = first = a = 0.0
    for number, (keys, residuals) in enumerate(BATCHES):
        scale = WEIGHT if number == 0 else a * length * WEIGHT
        asked = residuals @ keys.T + scale * (W_0 - weights) @ C
        asked = asked + outputs - weights @ history
        update = asked @ torch.linalg.inv(keys @ keys.T + scale * C + history)
        weights = weights + update
        history, outputs = history + keys @ keys.T, outputs + weights @ keys @ keys.T
        loss = float(((weights - W_0) @ C @ (weights - W_0).T).trace())
        if number == 0:
            first, length = loss, math.sqrt(alpha * loss)
            a = 1 / length
        length = max(length + a * (loss - alpha * first), math.sqrt(alpha * first))
        found.append((update, length))
    return found


# The bound is never met, met after some batches, or exceeded from the second one on.
@pytest.mark.parametrize("alpha", [1e4, 60.0, 1.0])
def test_updates_and_queue_are_those_of_the_published_formulas(alpha: float) -> None:
    ours, lengths = edited(alpha), []
    for (keys, residuals), (wanted, length) in zip(BATCHES, published(alpha), strict=True):
        assert relative(ours.edit(keys, residuals), wanted) < 1e-6
        lengths.append(float(ours.state["m.queue"][0]))
        assert lengths[-1] == pytest.approx(length, rel=1e-6)
    assert (max(lengths) > lengths[0]) == (alpha < 1e4), "the queue grows where the bound is met"


def test_while_the_queue_rests_an_update_has_the_rank_of_two_batches() -> None:
    ours = edited(1e4)
    ours.edit(*BATCHES[0])
    keys, residuals = BATCHES[1]
    problem = LeastSquares(module="m", keys_IN=keys, residuals_ON=residuals, weight=WEIGHT)
    update = ours.restraint.solve(problem, ours.state, ours.moments)
    assert isinstance(update, LowRank) and update.rank == 2 + 3


def test_a_growing_queue_lowers_the_preservation_loss() -> None:
    def loss(alpha: float) -> float:
        ours = edited(alpha)
        for keys, residuals in BATCHES:
            ours.edit(keys, residuals)
        return float((ours.total @ C @ ours.total.T).trace())

    assert loss(1.0) < 0.8 * loss(1e4)


def test_a_batch_that_writes_nothing_is_not_the_first_one() -> None:
    ours, (keys, residuals) = edited(1e4), BATCHES[0]
    ours.edit(keys, 0 * residuals)
    assert "m.queue" not in ours.state
    ours.edit(keys, residuals)
    assert all(torch.isfinite(tensor).all() for tensor in ours.state.values())


def test_a_bound_that_is_not_positive_is_refused() -> None:
    with pytest.raises(OptionError, match="alpha: out of range"):
        LyapLock(alpha=0.9)
