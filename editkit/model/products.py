"""Matrix products of linear layers in bfloat16, in a network whose weights are float32.

CPUs with AMX or AVX-512 BF16, and GPUs, compute such products several times faster. Everything
between the products stays in float32. bfloat16 keeps 8 bits of each factor, so a product is off by
about 0.4 %; sums are float32.

Shape letters: I input width, O output width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from editkit.lazy import torch
from editkit.model.replaced import replaced_forwards

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

Products = Literal["float32", "bfloat16"]


def rounded_weights(model: EditableModel, layers: Iterable[int]) -> dict[Any, torch.Tensor]:
    """Copies in bfloat16, (O, I), of the float32 weights of all linear layers in these blocks."""
    from transformers.pytorch_utils import Conv1D

    linear: list[Any] = [
        module
        for layer in layers
        for module in model.module(model.family.block(layer)).modules()
        if type(module) in (torch.nn.Linear, Conv1D)
    ]
    return {
        module: (weight.T if isinstance(module, Conv1D) else weight).to(torch.bfloat16)
        for module in linear
        if (weight := module.weight.detach()).dtype == torch.float32
        and not weight.is_meta  # accelerate loads such a weight when its layer runs
    }


def rounded_products(
    weights_OI: Mapping[Any, torch.Tensor],
) -> contextlib.AbstractContextManager[None]:
    """Computes the products of these linear layers in bfloat16 within the context. Gradients of the
    inputs flow, those of the weights do not.
    """
    return replaced_forwards(
        {module: _rounded(weight_OI, module.bias) for module, weight_OI in weights_OI.items()}
    )


def _rounded(weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> Any:
    def product(hidden: torch.Tensor) -> torch.Tensor:
        output = torch.nn.functional.linear(hidden.to(torch.bfloat16), weight_OI).to(hidden.dtype)
        return output if bias_O is None else output + bias_O

    return product
