"""Products in bfloat16: close to float32, in linear layers alone, and gone afterwards."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from editkit.model.products import rounded_products, rounded_weights
from editkit.model.shortcuts import Shortcuts, compared, difference
from editkit.targets.search import search_target
from editkit.targets.self_check import compare_search
from tests.support.helpers import KINDS, Kind, request, tiny_model
from tests.support.searches import CONTEXTS, settings


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_rounded_factors(kind: Kind) -> None:
    model = tiny_model(kind)
    name = model.family.down_projection(1)
    module, generator = model.module(name), torch.Generator().manual_seed(1)
    weight_OI = model.weight(name).detach()
    input_MI = torch.randn(5, weight_OI.shape[1], generator=generator).requires_grad_()
    outside = model.module(model.family.down_projection(0))
    weights = rounded_weights(model, [1])
    assert module in weights and outside not in weights
    with rounded_products(weights):
        ours_MO, other_MO = module(input_MI), outside(input_MI)
    rounded = [values.to(torch.bfloat16).float() for values in (input_MI, weight_OI)]
    plain_MO = rounded[0] @ rounded[1].T
    bias_O = getattr(module, "bias", None)
    plain_MO = plain_MO if bias_O is None else plain_MO + bias_O
    assert ours_MO.dtype == torch.float32
    assert difference(ours_MO, plain_MO) <= 2**-8  # the product itself is rounded once more
    assert torch.equal(other_MO, outside(input_MI)), "other blocks are exact"
    exact_MO = module(input_MI)
    (ours_MI,), (exact_MI,) = (
        torch.autograd.grad(output.sum(), input_MI) for output in (ours_MO, exact_MO)
    )
    assert 0 < difference(ours_MO, exact_MO) < 2**-7, "the module is exact again"
    assert 0 < difference(ours_MI, exact_MI) < 2**-7


def test_networks_of_another_dtype_are_left_alone() -> None:
    assert rounded_weights(tiny_model(dtype="float64"), [0, 1, 2]) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_with_rounded_products_reaches_the_target_of_an_exact_one(kind: Kind) -> None:
    model, edit = tiny_model(kind), request()
    site, exact = model.family.mlp(1), settings(steps=8)
    found = [
        search_target(model, edit, site=site, contexts=CONTEXTS, settings=chosen)
        for chosen in (exact, dataclasses.replace(exact, products="bfloat16"))
    ]
    assert 0 < difference(found[1].vector_O, found[0].vector_O) < 0.05
    assert torch.equal(found[1].initial_O, found[0].initial_O)
    again = search_target(model, edit, site=site, contexts=CONTEXTS, settings=exact)
    assert torch.equal(again.vector_O, found[0].vector_O), "nothing of the copies remains"


def test_a_run_compares_them_with_the_whole_network_and_falls_back() -> None:
    model, edit = tiny_model("llama"), request()
    site = model.family.mlp(1)
    found = compare_search(model, edit, site, products="bfloat16")
    assert [each.shortcut for each in found] == ["search", "products"]
    assert all(each.agrees for each in found)
    assert found[0].differences["loss"] < 1e-5 < found[1].differences["gradient"]

    chosen = dataclasses.replace(settings(steps=4), products="bfloat16")
    exact = dataclasses.replace(chosen, products="float32")
    wrong = compared("products", None, {"loss": torch.ones(1)}, dtype=torch.bfloat16)
    model.shortcuts = Shortcuts(comparisons=(wrong,))
    assert "compute their products in float32" in model.shortcuts.warnings("a", "b")[0]
    vectors = [
        search_target(model, edit, site=site, contexts=CONTEXTS, settings=each).vector_O
        for each in (chosen, exact)
    ]
    assert torch.equal(*vectors)
