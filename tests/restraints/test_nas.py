from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from editkit.errors import OptionError
from editkit.restraints.nas import Nas, anchor
from editkit.targets.forwards import site_outputs
from editkit.targets.search import search_targets
from editkit.targets.sequences import prepare
from tests.support.helpers import KINDS, requests, tiny_model
from tests.support.searches import settings

CONTEXTS = ("{}", "It is so. {}")
OPTIONS = settings(steps=4, stop_loss=0.0, lr=0.3)


def search(model: Any, site: str, objective: Any = None) -> Any:
    return search_targets(
        model, requests(3), site=site, contexts=CONTEXTS, settings=OPTIONS, objective=objective
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_block", [True, False])
def test_the_mlps_output_with_delta_gets_the_norm_and_keeps_its_direction(
    kind: Any, at_block: bool
) -> None:
    model = tiny_model(kind)
    mlp = model.family.mlp(1)
    site = model.family.block(1) if at_block else mlp
    texts = [
        prepare(model, each, CONTEXTS, kl_position=OPTIONS.kl_position) for each in requests(3)
    ]
    before = site_outputs(model, mlp, texts).double()
    plain, anchored = search(model, site), search(model, site, Nas(norm=0.7, variant="paper"))
    for number, (free, found) in enumerate(zip(plain, anchored, strict=True)):
        vector = before[number] + free.delta_O.double()
        wanted = 0.7 * vector / vector.norm() - before[number]
        assert float((found.delta_O - wanted).norm() / wanted.norm()) < 1e-5
        assert found.updates == free.updates and found.loss != free.loss
        assert torch.equal(found.initial_O, free.initial_O), "z is h - v_0 + v*"


def test_the_published_code_takes_an_edit_back_whose_target_is_twice_as_long() -> None:
    model = tiny_model("llama")
    site = model.family.mlp(1)
    lengths = [float(found.vector_O.norm()) for found in search(model, site)]
    ordered = sorted(lengths)
    between = (ordered[1] + ordered[2]) / 4  # twice it lies below the longest alone
    found = search(model, site, Nas(norm=between, variant="published_code"))
    for length, one in zip(lengths, found, strict=True):
        taken_back = length == ordered[-1]
        assert bool((one.delta_O == 0).all()) == taken_back
    kept = search(model, site, Nas(norm=between, variant="paper"))
    assert all(float(one.vector_O.norm()) == pytest.approx(between, rel=1e-4) for one in kept)


def test_the_anchor_is_the_mean_without_the_largest_twentieth() -> None:
    norms = torch.cat([torch.ones(19), torch.tensor([1000.0])])[torch.randperm(20)]
    assert anchor(norms) == 1.0
    assert anchor(torch.tensor([1.0, 3.0])) == 2.0


def test_a_norm_that_is_not_positive_is_refused() -> None:
    with pytest.raises(OptionError, match="norm: must be positive"):
        replace(Nas(norm=1.0, variant="paper"), norm=0.0)
