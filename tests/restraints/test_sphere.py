from __future__ import annotations

from typing import Any

import pytest
import torch

from editkit.errors import OptionError
from editkit.linalg.lowrank import LowRank, dense
from editkit.restraints.base import Norms
from editkit.restraints.sphere import Sphere, leading_directions
from tests.support.methods import noise, relative

NORMS = Norms(sigma_max=1.0, frobenius=1.0)


def plain(update: torch.Tensor, weight: torch.Tensor, energy: float, alpha: float) -> torch.Tensor:
    """As published, from the I x I matrix."""
    rows = weight / weight.norm(dim=1, keepdim=True)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    values, vectors = values.flip(0), vectors.flip(1)
    shares = values.cumsum(0) / values.sum()
    leading = vectors[:, : int((shares < energy).sum()) + 1]
    return update - alpha * update @ leading @ leading.T


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
@pytest.mark.parametrize(("energy", "alpha"), [(0.5, 0.5), (0.5, 0.8), (0.9, 1.0)])
def test_the_damped_update_is_the_published_one_by_a_thin_decomposition(
    shape: Any, energy: float, alpha: float
) -> None:
    weight = noise(*shape, seed=1) * torch.logspace(0, 2, shape[0]).double()[:, None]
    update = LowRank(noise(shape[0], 3, seed=2), noise(shape[1], 3, seed=3))
    sphere = Sphere(energy=energy, alpha=alpha)
    wanted = plain(update.dense(), weight, energy, alpha)
    damped = sphere.restrain(update, weight, NORMS)
    assert isinstance(damped, LowRank) and damped.rank == 3
    assert relative(damped.dense(), wanted) < 1e-6
    assert relative(dense(sphere.restrain(update.dense(), weight, NORMS)), wanted) < 1e-6


def test_rows_count_by_their_direction_and_a_row_of_zeros_has_none() -> None:
    weight = noise(6, 20, seed=4)
    scaled = weight * torch.tensor([1.0, 1e3, 1e-3, 5.0, 2.0, 1.0]).double()[:, None]
    first, second = (leading_directions(each, 0.5) for each in (weight, scaled))
    torch.testing.assert_close(first @ first.T, second @ second.T)
    weight[0] = 0.0
    directions = leading_directions(weight, 1.0)
    assert directions.shape == (20, 5) and bool(directions.isfinite().all())


def test_options_out_of_range_are_refused_together() -> None:
    with pytest.raises(OptionError) as raised:
        Sphere(energy=0, alpha=1.5)
    assert "energy" in str(raised.value) and "alpha" in str(raised.value)
