from __future__ import annotations

import pytest
import torch

from editkit.errors import OptionError
from editkit.restraints.emmet import EmmetConstraint
from tests.support.methods import Edited, moments_of, noise, relative, second_moment

ROWS, SIZE, WEIGHT = 10, 32, 2.0
C = second_moment(SIZE, seed=3)


@pytest.mark.parametrize(("relaxation", "requests"), [(0.0, 3), (0.1, 3), (0.1, 1)])
def test_the_update_is_the_papers_and_exact_without_relaxation(
    relaxation: float, requests: int
) -> None:
    keys, residuals = noise(SIZE, requests, seed=1), noise(ROWS, requests, seed=2)
    restraint = EmmetConstraint(relaxation=relaxation)
    ours = Edited(restraint, moments_of({"m": C}), WEIGHT, noise(ROWS, SIZE, seed=9))
    update, inverse = ours.edit(keys, residuals), torch.linalg.inv(WEIGHT * C)
    used = relaxation if requests > 1 else 0.0
    gram = keys.T @ inverse @ keys + used * torch.eye(requests)
    assert relative(update, residuals @ torch.linalg.inv(gram) @ keys.T @ inverse) < 1e-6
    assert (relative(update @ keys, residuals) < 1e-6) == (used == 0)


def test_a_negative_relaxation_is_refused() -> None:
    with pytest.raises(OptionError, match="relaxation: must not be negative"):
        EmmetConstraint(relaxation=-1)
