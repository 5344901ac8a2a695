from __future__ import annotations

import pytest
import torch

from editkit.errors import OptionError
from editkit.restraints.d4s import D4S
from editkit.restraints.encore import Encore
from tests.support.methods import Edited, moments_of, noise, relative, second_moment

ROWS, SIZE, WEIGHT, FROBENIUS = 10, 32, 2.0, 0.7
C = second_moment(SIZE, seed=3)
BATCHES = [(noise(SIZE, n, seed=i), noise(ROWS, n, seed=50 + i)) for i, n in enumerate((1, 3, 12))]


def edited(restraint: object) -> Edited:
    matrix = noise(ROWS, SIZE, seed=9)
    return Edited(restraint, moments_of({"m": C}), WEIGHT, matrix)  # type: ignore[arg-type]


def test_each_update_is_the_published_formula_over_all_earlier_keys() -> None:
    ours, history = edited(Encore(frobenius=FROBENIUS)), torch.zeros(SIZE, SIZE).double()
    for keys, residuals in BATCHES:
        system = WEIGHT * C + FROBENIUS * torch.eye(SIZE) + history + keys @ keys.T
        wanted = residuals @ keys.T @ torch.linalg.inv(system)
        assert relative(ours.edit(keys, residuals), wanted) < 1e-6
        history = history + keys @ keys.T  # not scaled by lambda


def test_without_the_frobenius_term_it_is_d4s_on_the_trajectory() -> None:
    ours, d4s = edited(Encore(frobenius=1e-12)), edited(D4S())
    for keys, residuals in BATCHES:
        assert relative(ours.edit(keys, residuals), d4s.edit(keys, residuals)) < 1e-6


def test_a_second_moment_that_cannot_be_inverted_is_no_obstacle() -> None:
    singular = C.clone()
    singular[0], singular[:, 0] = 0.0, 0.0
    keys, residuals = BATCHES[1]
    ours = Edited(
        Encore(frobenius=0.5), moments_of({"m": singular}), WEIGHT, noise(ROWS, SIZE, seed=9)
    )
    system = WEIGHT * singular + 0.5 * torch.eye(SIZE) + keys @ keys.T
    wanted = residuals @ keys.T @ torch.linalg.inv(system)
    assert relative(ours.edit(keys, residuals), wanted) < 1e-6


def test_a_weight_that_is_not_positive_is_refused() -> None:
    with pytest.raises(OptionError, match="frobenius: must be positive"):
        Encore(frobenius=0)
