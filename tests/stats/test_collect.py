"""Second moments equal the dense ones. Batching and the blocks of the triangle do not
change them.
"""

from __future__ import annotations

import pytest
import torch

from editkit.errors import ConfigError
from editkit.stats import collect as collecting
from editkit.stats.collect import Products, TriangleSum, collect
from tests.stats.test_store import MANY, dense, modules_of
from tests.support.helpers import KINDS, SENTENCES, Kind, tiny_model


@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_the_outer_products_of_every_token_without_padding(kind: Kind) -> None:
    model = tiny_model(kind)
    [module] = modules_of(model, 1)
    actual = collect(model, [module], SENTENCES, context_length=32, batch_tokens=200)[module]
    expected_II, num_tokens = dense(model, module, SENTENCES)
    assert actual.num_tokens == num_tokens
    assert actual.sum_II.dtype == torch.float64
    assert float((actual.sum_II - expected_II).norm() / expected_II.norm()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_for_several_modules_is_one_pass_for_each(kind: Kind) -> None:
    model = tiny_model(kind)
    modules = modules_of(model, 2, 0, 1)
    together = collect(model, modules, MANY, context_length=32, batch_tokens=256)
    for module in modules:
        alone = collect(model, [module], MANY, context_length=32, batch_tokens=256)[module]
        assert torch.equal(alone.sum_II, together[module].sum_II)
        assert alone.num_tokens == together[module].num_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_size_changes_nothing(kind: Kind) -> None:
    model = tiny_model(kind, dtype="float64")  # so that rounding does not hide a difference
    [module] = modules_of(model, 1)
    sums = [
        collect(model, [module], MANY, context_length=32, batch_tokens=tokens)[module]
        for tokens in (1, 100, 10_000)
    ]
    for other in sums[1:]:
        assert other.num_tokens == sums[0].num_tokens
        assert float((other.sum_II - sums[0].sum_II).norm() / sums[0].sum_II.norm()) < 1e-10


def test_a_pass_is_no_larger_than_allowed_and_stops_above_the_last_module() -> None:
    model = tiny_model("gpt2")
    shapes: list[tuple[int, ...]] = []
    model.module("transformer.h.1").register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape[:2]))
    )
    model.module("transformer.h.2").register_forward_pre_hook(
        lambda *_: pytest.fail("ran on behind the last module")
    )
    collect(model, modules_of(model, 0, 1), MANY, context_length=32, batch_tokens=200)
    assert len(shapes) > 1
    assert all(rows * width <= 200 for rows, width in shapes)
    assert sum(rows for rows, _ in shapes) == len(MANY)


@pytest.mark.parametrize("size", [5, 256, 300, 1000])
def test_half_of_the_products_make_the_whole_sum(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    total, expected_II = TriangleSum.zeros(size), torch.zeros(size, size, dtype=torch.float64)
    for rows in (3, 40):
        keys_MI = torch.randn(rows, size, generator=generator)
        total.add_products(keys_MI, "float32")
        expected_II += keys_MI.double().T @ keys_MI.double()
    dense_II = total.dense()
    assert torch.equal(dense_II, dense_II.T)
    assert float((dense_II - expected_II).norm() / expected_II.norm()) < 1e-6
    assert total.num_bytes == sum(block.nbytes for block in total.blocks) <= expected_II.nbytes


def test_bfloat16_products_are_those_of_rounded_keys_and_are_summed_in_float64() -> None:
    model = tiny_model("gpt2")
    [module] = modules_of(model, 1)
    actual, exact = (
        collect(model, [module], MANY, context_length=32, batch_tokens=256, products=products)[
            module
        ].sum_II
        for products in ("bfloat16", "float32")
    )
    difference = float((actual - exact).norm() / exact.norm())
    assert 1e-6 < difference < 1e-2
    keys_MI = torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    total = TriangleSum.zeros(40)
    total.add_products(keys_MI, "bfloat16")
    rounded_MI = keys_MI.bfloat16().double()
    torch.testing.assert_close(total.dense(), rounded_MI.T @ rounded_MI, rtol=1e-5, atol=1e-5)


def test_a_bfloat16_network_loses_nothing_by_bfloat16_products() -> None:
    model = tiny_model("llama", dtype="bfloat16")
    [module] = modules_of(model, 1)
    sums = [
        collect(model, [module], MANY, context_length=32, batch_tokens=256, products=products)[
            module
        ].sum_II
        for products in ("bfloat16", "float32")
    ]
    assert torch.equal(*sums)


def test_documents_of_one_length_are_packed_without_waste_and_others_with_little(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("gpt2")
    monkeypatch.setattr(collecting, "SMALL_BATCH", 64)
    areas, tokens = [], 0
    model.module("transformer.h.0").register_forward_pre_hook(
        lambda _, args: areas.append(args[0].shape[:2].numel())
    )
    tokens = collect(model, modules_of(model, 0), MANY, context_length=64, batch_tokens=2000)[
        modules_of(model, 0)[0]
    ].num_tokens
    assert tokens <= sum(areas) <= 1.1 * tokens
    assert len(areas) < len(MANY) / 2


@pytest.mark.parametrize("waiting", [40, 100_000])
def test_how_many_keys_wait_for_a_product_changes_rounding_alone(
    monkeypatch: pytest.MonkeyPatch, waiting: int
) -> None:
    model = tiny_model("gptj", dtype="float64")
    [module] = modules_of(model, 1)
    expected_II, num_tokens = dense(model, module, MANY)
    monkeypatch.setattr(collecting, "PRODUCT_TOKENS", waiting)
    actual = collect(model, [module], MANY, context_length=32, batch_tokens=40)[module]
    assert actual.num_tokens == num_tokens
    assert float((actual.sum_II - expected_II).norm() / expected_II.norm()) < 1e-10


def test_long_documents_count_with_their_beginning() -> None:
    model = tiny_model("llama")
    [module] = modules_of(model, 0)
    actual = collect(model, [module], [" ".join(SENTENCES)], context_length=9, batch_tokens=4)[
        module
    ]
    assert actual.num_tokens == 9
    torch.testing.assert_close(
        actual.sum_II, dense(model, module, [" ".join(SENTENCES)], 9)[0], rtol=1e-5, atol=1e-6
    )


def test_progress_counts_documents_and_no_text_is_an_error() -> None:
    model = tiny_model("gpt2")
    seen: list[tuple[int, int]] = []
    collect(
        model,
        modules_of(model, 0),
        MANY,
        context_length=16,
        batch_tokens=200,
        progress=lambda *counts: seen.append(counts),
    )
    assert seen == sorted(seen)
    assert seen[-1] == (len(MANY), len(MANY))
    with pytest.raises(ConfigError, match="no token"):
        collect(model, modules_of(model, 0), [""], context_length=16, batch_tokens=200)


@pytest.mark.gpu
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
def test_a_gpu_gives_the_sums_of_the_processor(products: Products) -> None:
    keys_MI = torch.randn(500, 600, generator=torch.Generator().manual_seed(0))
    here, there = TriangleSum.zeros(600), TriangleSum.zeros(600, "cuda")
    here.add_products(keys_MI, products)
    there.add_products(keys_MI.cuda(), products)
    torch.testing.assert_close(there.dense().cpu(), here.dense(), rtol=1e-4, atol=1e-3)
