"""The shortcuts of target searches and of keys beside the plain computation, for one request.

Shape letters: N requests, O width of the sites' outputs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.products import Products
from editkit.model.shortcuts import Comparison, attempted, compared, difference, tolerance_of
from editkit.model.tokens import PLACE, pad
from editkit.targets.descent import Forward
from editkit.targets.forwards import (
    Sites,
    at_least_float32,
    plain_forward,
    site_outputs,
    suffix_forward,
    suffix_layer,
)
from editkit.targets.keys import layerwise, subject_texts
from editkit.targets.sequences import prepare
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

CONTEXTS = (PLACE, f"Therefore. {PLACE}")
SIZE = 0.5  # |delta| / |v|


def compare_search(
    model: EditableModel, request: EditRequest, site: Sites, *, products: Products = "float32"
) -> list[Comparison]:
    """The sites' output v, and the loss of a delta with its gradient, by a cached suffix and by
    the whole network; the same for a suffix with rounded products, where these are asked for.
    Nothing if searches run the whole network anyway.

    The suffix is that of the request twice, so that it has prefixes to share.
    """
    sequences = prepare(model, request, CONTEXTS, kl_position="prompt_end")
    layer = suffix_layer(model, site, sequences)
    if layer is None:
        return []
    value_NO = site_outputs(model, site, [sequences])
    generator = torch.Generator().manual_seed(0)
    delta_O = torch.randn(value_NO.shape[1], generator=generator).to(value_NO)
    delta_O *= SIZE * torch.linalg.vector_norm(value_NO) / torch.linalg.vector_norm(delta_O)

    with torch.no_grad():  # one token, for the size of the vocabulary
        hidden_1D = model.final_hidden(pad([sequences.ids[0][:1]], device=model.device))[0]
        logits_1V = at_least_float32(model.hidden_to_logits(hidden_1D))
        uniform_1V = torch.zeros_like(logits_1V).log_softmax(dim=-1)

    def by_suffix(products: Products) -> dict[str, torch.Tensor]:
        suffix, clean_NO = suffix_forward(
            model, site, layer, [sequences] * 2, least_shared=1, products=products
        )
        return {"value": clean_NO} | _loss_and_gradient(suffix, delta_O.expand(2, -1), uniform_1V)

    whole = plain_forward(model, site, [sequences])
    plain = {"value": value_NO} | _loss_and_gradient(whole, delta_O[None], uniform_1V)
    twice = {name: torch.cat([values, values]) for name, values in plain.items()}
    exact = compared("search", attempted(partial(by_suffix, "float32")), twice, dtype=model.dtype)
    if products == "float32" or not exact.agrees:
        return [exact]
    ours = attempted(partial(by_suffix, products))
    return [exact, compared("products", ours, twice, dtype=getattr(torch, products))]


def _loss_and_gradient(
    forward: Forward, delta_NO: torch.Tensor, before_1V: torch.Tensor
) -> dict[str, torch.Tensor]:
    """(N,) and (N, O): -log p of the target plus the divergence from a distribution."""
    with torch.enable_grad():
        delta_NO = delta_NO.detach().clone().requires_grad_()
        result = forward(delta_NO, before_1V.expand(len(delta_NO), -1))
        loss_N = -result.log_p_NC.mean(dim=1) + result.kl_N
        (gradient_NO,) = torch.autograd.grad(loss_N.sum(), delta_NO)
    return {"loss": loss_N.detach(), "gradient": gradient_NO}


def compare_keys(
    model: EditableModel, request: EditRequest, layers: Sequence[int], value_at: str | None = None
) -> Comparison:
    """The keys of these layers and the output of the last one, or of the module `value_at` in it,
    layer by layer from kept hidden states, and from one pass of the whole network.
    """
    texts = subject_texts(model, request, CONTEXTS)
    names = [f"key {layer}" for layer in layers]

    def by_layer() -> dict[str, torch.Tensor]:
        forward = layerwise(model, [texts])
        keys = {name: forward.keys(layer) for name, layer in zip(names, layers, strict=True)}
        return keys | {"output": forward.outputs(layers[-1], value_at)}

    modules, block = model.down_projections(layers), value_at or model.family.block(layers[-1])
    batch = pad(texts, device=model.device)
    with torch.no_grad(), capture(model, inputs=modules, outputs=[block]) as captured:
        model.final_hidden(batch)
    rows, ends = range(len(texts)), [len(text) - 1 for text in texts]
    read = [captured.inputs[module] for module in modules] + [captured.outputs[block]]
    plain = [values_BTX[rows, ends] for values_BTX in read]
    by_name = dict(zip([*names, "output"], plain, strict=True))
    return compared("keys", attempted(by_layer), by_name, dtype=model.dtype)


def require_outputs(model: EditableModel, request: EditRequest, site: str, module: str) -> None:
    """Raises ConfigError unless the site returns what the edited matrix returns, which ROME's
    update takes for granted.
    """
    sequences = [prepare(model, request, CONTEXTS[:1], kl_position="prompt_end")]
    at_site, at_module = (site_outputs(model, name, sequences) for name in (site, module))
    if difference(at_site, at_module) > tolerance_of(model.dtype):
        raise ConfigError(
            message(
                "model.family.mlp_in_block",
                f"the output of this module of {model.name} is not that of its down projection",
                got=model.family.mlp_in_block,
                fix=f"set mlp_in_block to the down projection itself, "
                f"{model.family.down_projection_in_block}",
            )
        )
