from __future__ import annotations

import torch

from editkit.restraints.mose import Mose
from tests.support.methods import Edited, moments_of, noise, relative, second_moment

ROWS, SIZE, WEIGHT = 10, 32, 0.5
C, W_0 = second_moment(SIZE, seed=3), noise(ROWS, SIZE, seed=9)
BATCHES = [(noise(SIZE, n, seed=i), noise(ROWS, n, seed=50 + i)) for i, n in enumerate((1, 3, 12))]


def test_each_update_turns_the_matrix_so_that_its_singular_values_stay() -> None:
    ours, values = Edited(Mose(), moments_of({"m": C}), WEIGHT, W_0), torch.linalg.svdvals(W_0)
    for keys, residuals in BATCHES:
        update = ours.edit(keys, residuals)
        assert float(update.norm()) > 0.1
        assert relative(torch.linalg.svdvals(W_0 + ours.total), values) < 1e-6


def test_no_other_turn_meets_targets_and_common_text_better() -> None:
    keys, residuals = BATCHES[1]
    ours = Edited(Mose(), moments_of({"m": C}), WEIGHT, W_0)
    turned = W_0 + ours.edit(keys, residuals)
    wanted = W_0 @ keys + residuals

    def objective(matrix: torch.Tensor) -> float:
        change = matrix - W_0
        common = (change @ C @ change.T).trace()
        return float((matrix @ keys - wanted).square().sum() + WEIGHT * common)

    best = objective(turned)
    assert best < objective(W_0)
    for seed in range(20):
        skew = noise(ROWS, ROWS, seed=seed)
        for size in (1e-3, 1e-1):
            near = torch.linalg.matrix_exp(size * (skew - skew.T)) @ turned
            assert objective(near) > best
