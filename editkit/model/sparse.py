"""Linear layers and MLPs that run only at the tokens whose results are read.

A batch contains padding, and few outputs of a last block are read. Attention mixes tokens and needs
the full rectangle. Linear layers and MLPs, most of a network's arithmetic, act on each token
separately and can leave tokens out.

Shape letters: B rows, T tokens (padded), M chosen tokens, X and Y input and output width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from editkit.lazy import torch
from editkit.model.replaced import replaced_forwards

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


# Up to this number of tokens a GPU's time hardly depends on it: reading the weights dominates.
FEW_TOKENS = 256


def sparse_modules(
    model: EditableModel,
    layers: Iterable[int],
    is_token_BT: torch.Tensor,
    *,
    read_layer: int = -1,
    is_read_BT: torch.Tensor | None = None,
) -> dict[Any, torch.Tensor]:
    """The modules of these blocks that can leave tokens out, with the tokens at which each must
    run: the argument of `at_tokens`.

    Args:
        is_token_BT: marks all tokens that are not padding; on the CPU.
        read_layer: a layer whose MLP runs only at the tokens that `is_read_BT` marks.
    """
    if model.device.type == "cuda" and is_token_BT.numel() <= FEW_TOKENS:
        return {}
    token_M, read_M = (
        mask_BT.flatten().nonzero()[:, 0].to(model.device)
        for mask_BT in (is_token_BT, is_token_BT if is_read_BT is None else is_read_BT)
    )
    tokens_by_module: dict[Any, torch.Tensor] = {}
    for layer in layers:
        mlp, others = tokenwise_modules(model, layer)
        tokens_by_module |= {model.module(name): token_M for name in others}
        tokens_by_module[model.module(mlp)] = read_M if layer == read_layer else token_M
    return {
        module: tokens_M
        for module, tokens_M in tokens_by_module.items()
        if len(tokens_M) < is_token_BT.numel()
    }


def tokenwise_modules(model: EditableModel, layer: int) -> tuple[str, tuple[str, ...]]:
    """The MLP of a block, and the block's linear layers outside the MLP (those of its
    attention).
    """
    from transformers.pytorch_utils import Conv1D

    block, mlp = model.family.block(layer), model.family.mlp(layer)
    whole = mlp  # of a mixture, its router and its experts
    if model.family.experts_in_block is not None:
        whole = model.family.experts(layer).rpartition(".")[0]
    inside = {
        name: module
        for name, module in model.module(block).named_modules(prefix=block)
        if not f"{name}.".startswith(f"{whole}.")
    }
    return mlp, tuple(
        name for name, module in inside.items() if isinstance(module, torch.nn.Linear | Conv1D)
    )


def at_tokens(
    tokens_by_module: Mapping[Any, torch.Tensor],
) -> contextlib.AbstractContextManager[None]:
    """Runs each of these modules only at the chosen tokens of its input; other tokens get zeros.

    A module must map (B, T, X) to (B, T, Y) for each token separately. It gets the chosen tokens as
    (1, M, X). A module that is called with rows of tokens, (B x T, X), gets (M, X). Gradients flow.

    Args:
        tokens_by_module: distinct indices into the flattened B x T tokens.
    """
    return replaced_forwards(
        {module: _at(module.forward, tokens_M) for module, tokens_M in tokens_by_module.items()}
    )


def _at(
    forward: Callable[[torch.Tensor], torch.Tensor], tokens_M: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    def sparse(hidden_BTX: torch.Tensor) -> torch.Tensor:
        shape_BT = hidden_BTX.shape[:-1]
        chosen_MX = hidden_BTX.flatten(0, -2).index_select(0, tokens_M.to(hidden_BTX.device))
        output_MY = forward(chosen_MX) if len(shape_BT) == 1 else forward(chosen_MX[None])[0]
        places_M = tokens_M.to(output_MY.device)  # a module may lie on another device
        result: torch.Tensor = (
            output_MY.new_zeros(shape_BT.numel(), output_MY.shape[-1])
            .index_copy(0, places_M, output_MY)
            .unflatten(0, shape_BT)
        )
        return result

    return sparse
