"""Grouped query heads give the outputs and gradients of repeated keys and values."""

from __future__ import annotations

import pytest
import torch

from editkit.model import grouped_attention as grouping
from editkit.model.cached_suffix import prepare
from tests.support.helpers import tiny_model


@pytest.mark.parametrize("num_shared", [1, 2, 6])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float64])
def test_it_equals_repeated_keys_and_values(num_shared: int, mask_dtype: torch.dtype) -> None:
    num_heads, num_tokens, num_all, width = 6, 3, 7, 4
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    query = drawn(num_heads, num_tokens, width).requires_grad_()
    key, value = (drawn(num_shared, num_all, width).requires_grad_() for _ in range(2))
    mask = torch.ones(2, 1, num_tokens, num_all, dtype=torch.bool).tril(num_all - num_tokens)
    mask[1, :, :, :2] = False  # padding
    shown = mask if mask_dtype == torch.bool else torch.where(mask, 0.0, -1e9).to(mask_dtype)

    scores = query @ key.repeat_interleave(num_heads // num_shared, 1).mT * 0.3
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    plain = weights @ value.repeat_interleave(num_heads // num_shared, 1)
    module = torch.nn.Module()
    module.num_key_value_groups = num_heads // num_shared  # type: ignore[assignment]
    ours = grouping.attend(module, query, key, value, shown, scaling=0.3)[0].transpose(1, 2)
    weight = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    results = [
        (output, *torch.autograd.grad((output * weight).sum(), (query, key, value)))
        for output in (plain, ours)
    ]
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


def test_a_suffix_groups_heads_and_restores_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("llama"), []
    config = model.network.config
    groups = config.num_attention_heads // config.num_key_value_heads
    assert config._attn_implementation == "sdpa" and groups > 1
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def noted(query: torch.Tensor, key: torch.Tensor, *args: object, **options: object) -> object:
        rows.append((query.shape[1], query.shape[2]))
        return sdpa(query, key, *args, **options)  # type: ignore[arg-type]

    suffix = prepare(model, 0, [(3, 4, 5, 6, 7)], [2])
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    suffix.run(suffix.hidden_BSD)
    above = model.num_layers - 1
    assert rows == [(config.num_key_value_heads, groups * 3)] * above
    assert config._attn_implementation == "sdpa"


def test_other_attention_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(model.network.config, "_attn_implementation_internal", "eager")
    with grouping.grouped_attention(model):
        assert model.network.config._attn_implementation == "eager"
