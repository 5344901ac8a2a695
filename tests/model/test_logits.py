"""Sliced passes over the vocabulary give the values and gradients of a whole pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from editkit.model import logits
from editkit.model.logits import divergence, read, read_sliced
from tests.support.helpers import KINDS, Kind, tiny_model


def rows(
    kind: Kind, dtype: str, scale: float
) -> tuple[Any, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A model, final hidden states, tokens for the first four of them, and distributions for the
    other two.
    """
    model, generator = tiny_model(kind, dtype=dtype), torch.Generator().manual_seed(3)
    hidden_MD = scale * torch.randn(6, 32, generator=generator).to(model.dtype)
    before_NV = model.hidden_to_logits(
        hidden_MD[4:] + 0.3 * torch.randn(2, 32, generator=generator).to(model.dtype)
    ).log_softmax(-1)
    return model, hidden_MD, torch.tensor([5, 17, 5, 300]), before_NV


@pytest.mark.parametrize("slice_bytes", [1, 7000, 1 << 22])
@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_give_the_values_and_gradients_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, dtype: str, scale: float, slice_bytes: int
) -> None:
    monkeypatch.setattr(logits, "SLICE_BYTES", slice_bytes)
    model, hidden_MD, ids_K, before_NV = rows(kind, dtype, scale)
    if kind == "gptj":  # its head has a bias
        with torch.no_grad():
            model.network.lm_head.bias.normal_(generator=torch.Generator().manual_seed(1))
    tolerance = 2e-5 if dtype == "float32" else 1e-11
    for before in (before_NV, None):
        whole_MD, sliced_MD = (hidden_MD.clone().requires_grad_() for _ in range(2))
        whole, sliced = (
            read(model, whole_MD, ids_K, before),
            read_sliced(model, sliced_MD, ids_K, before),
        )
        for name in ("log_p_K", "kl_N", "log_p_NV"):
            torch.testing.assert_close(
                getattr(sliced, name), getattr(whole, name), rtol=tolerance, atol=tolerance
            )
        weights = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.7, -1.5])
        gradients = [
            torch.autograd.grad(
                (values.log_p_K * weights[0]).sum() + (values.kl_N * weights[1]).sum(), inputs_MD
            )[0]
            for values, inputs_MD in ((whole, whole_MD), (sliced, sliced_MD))
        ]
        assert torch.linalg.norm(gradients[0] - gradients[1]) <= tolerance * torch.linalg.norm(
            gradients[0]
        )


def test_a_divergence_from_itself_is_zero_even_with_large_logits() -> None:
    model, hidden_MD, ids_K, _ = rows("gpt2", "float32", 30.0)
    before_NV = read(model, hidden_MD, ids_K, None).log_p_NV
    moved_MD = hidden_MD.clone().requires_grad_()
    values = read_sliced(model, moved_MD, ids_K, before_NV)
    assert float(values.kl_N.detach().abs().max()) < 1e-5
    (gradient_MD,) = torch.autograd.grad(values.kl_N.sum(), moved_MD)
    assert float(gradient_MD.abs().max()) < 1e-5
    assert float(divergence(values.log_p_NV, before_NV).abs().max()) < 1e-5


def test_a_head_that_is_no_plain_matrix_is_read_whole() -> None:
    for dtype, cap in (("bfloat16", None), ("float32", 2.0)):
        model, hidden_MD, ids_K, before_NV = rows("llama", dtype, 1.0)
        model.head_is_matrix = cap is None
        whole, sliced = (
            read(model, hidden_MD, ids_K, before_NV.float()),
            read_sliced(model, hidden_MD, ids_K, before_NV.float()),
        )
        assert torch.equal(whole.log_p_K, sliced.log_p_K) and torch.equal(whole.kl_N, sliced.kl_N)


def test_a_nonfinite_row_does_not_affect_other_rows() -> None:
    model, hidden_MD, ids_K, before_NV = rows("gpt2", "float32", 1.0)
    intact = read_sliced(model, hidden_MD, ids_K, before_NV)
    hidden_MD[1], hidden_MD[4] = torch.nan, torch.inf
    broken = read_sliced(model, hidden_MD, ids_K, before_NV)
    assert broken.log_p_K.isfinite().tolist() == [
        True,
        False,
        True,
        True,
    ] and broken.kl_N.isfinite().tolist() == [False, True]
    assert torch.equal(intact.log_p_K[[0, 2, 3]], broken.log_p_K[[0, 2, 3]]) and torch.equal(
        intact.kl_N[1], broken.kl_N[1]
    )
