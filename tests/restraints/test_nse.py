from __future__ import annotations

import pytest
import torch

from editkit.errors import OptionError
from editkit.restraints.d4s import D4S
from editkit.restraints.nse import Nse, selected
from tests.support.methods import Edited, moments_of, noise, relative, second_moment

ROWS, SIZE, WEIGHT = 10, 32, 2.0
C = second_moment(SIZE, seed=3)
BATCHES = [(noise(SIZE, n, seed=i), noise(ROWS, n, seed=50 + i)) for i, n in enumerate((1, 3, 12))]


def edited(restraint: object) -> Edited:
    return Edited(restraint, moments_of({"m": C}), WEIGHT, noise(ROWS, SIZE, seed=9))  # type: ignore[arg-type]


def test_each_update_solves_over_the_selected_neurons_alone() -> None:
    ours, history = edited(Nse(share=0.8, base="trajectory")), torch.zeros(SIZE, SIZE).double()
    for keys, residuals in BATCHES:
        rows = selected(keys, 0.8)
        assert 0 < len(rows) < SIZE
        part = keys[rows]
        system = WEIGHT * C[rows][:, rows] + history[rows][:, rows] + part @ part.T
        wanted = torch.zeros(ROWS, SIZE).double()
        wanted[:, rows] = residuals @ part.T @ torch.linalg.inv(system)
        assert relative(ours.edit(keys, residuals), wanted) < 1e-6
        history = history + keys @ keys.T


def test_the_fewest_neurons_are_selected_that_hold_the_share() -> None:
    keys = torch.tensor([[1.0, -1.0], [5.0, 1.0], [0.5, 0.5], [-3.0, 0.0]]).double()
    assert selected(keys, 0.5).tolist() == [1]  # 6 of 12
    assert selected(keys, 0.51).tolist() == [1, 3]
    assert selected(keys, 0.75).tolist() == [1, 3]
    assert selected(keys, 1.0).tolist() == [0, 1, 2, 3]


def test_with_the_share_of_two_published_files_the_neurons_are_left_out() -> None:
    """p = 1 is D4S on the trajectory."""
    ours, d4s = edited(Nse(share=1.0, base="trajectory")), edited(D4S())
    for keys, residuals in BATCHES:
        assert relative(ours.edit(keys, residuals), d4s.edit(keys, residuals)) < 1e-6


@pytest.mark.parametrize("share", [0.0, 1.1])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(OptionError, match="share: out of range"):
        Nse(share=share, base="trajectory")
