"""Running what acts on each token alone (linear layers, MLPs) at chosen tokens only; nothing reads
the others.

Sequences side by side have padding, and of a last block's outputs few are read. Attention mixes
tokens and keeps its rectangle; most of a network's arithmetic does not, and is done here for the
tokens that count.

Shape letters: B rows, T tokens (padded), M chosen tokens, X and Y widths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from editkit.lazy import torch

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


# up to here a GPU's time hardly depends on their number: reading the weights is what takes it
FEW_TOKENS = 256


def sparse_modules(
    model: EditableModel,
    layers: Iterable[int],
    is_token_BT: torch.Tensor,
    *,
    read_layer: int = -1,
    is_read_BT: torch.Tensor | None = None,
) -> dict[Any, torch.Tensor]:
    """The modules of these blocks that can leave tokens out, each with the tokens at which it has
    to run: what `at_tokens` takes.

    All run at the tokens that `is_token_BT` (on the CPU) marks, but the MLP of `read_layer` where
    `is_read_BT` does.
    """
    if model.device.type == "cuda" and is_token_BT.numel() <= FEW_TOKENS:
        return {}
    token_M, read_M = (
        mask_BT.flatten().nonzero()[:, 0].to(model.device)
        for mask_BT in (is_token_BT, is_token_BT if is_read_BT is None else is_read_BT)
    )
    found: dict[Any, torch.Tensor] = {}
    for layer in layers:
        mlp, others = tokenwise_modules(model, layer)
        found |= {model.module(name): token_M for name in others}
        found[model.module(mlp)] = read_M if layer == read_layer else token_M
    return {
        module: tokens_M
        for module, tokens_M in found.items()
        if len(tokens_M) < is_token_BT.numel()
    }


def tokenwise_modules(model: EditableModel, layer: int) -> tuple[str, tuple[str, ...]]:
    """The MLP of a block, and its linear layers outside the MLP: those of the attention."""
    from transformers.pytorch_utils import Conv1D

    block, mlp = model.family.block(layer), model.family.mlp(layer)
    inside = {
        name: module
        for name, module in model.module(block).named_modules(prefix=block)
        if not f"{name}.".startswith(f"{mlp}.")
    }
    return mlp, tuple(
        name for name, module in inside.items() if isinstance(module, torch.nn.Linear | Conv1D)
    )


@contextlib.contextmanager
def at_tokens(tokens_by_module: Mapping[Any, torch.Tensor]) -> Iterator[None]:
    """Inside, each of these modules is given (1, M, X), the tokens of its (B, T, X) that count, and
    gives zeros for the others.

    `tokens_by_module` holds indices into B x T, each once. A module maps (B, T, X) to (B, T, Y),
    each token by itself. Gradients flow.
    """
    former = {
        module: vars(module).get("forward") for module in tokens_by_module
    }  # accelerate, too, sets it on the instance
    try:
        for module, tokens_M in tokens_by_module.items():
            module.forward = _at(module.forward, tokens_M)
        yield
    finally:
        for module, forward in former.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


def _at(
    forward: Callable[[torch.Tensor], torch.Tensor], tokens_M: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    def sparse(hidden_BTX: torch.Tensor) -> torch.Tensor:
        shape_BT = hidden_BTX.shape[:2]
        found_MY = forward(
            hidden_BTX.flatten(0, 1).index_select(0, tokens_M.to(hidden_BTX.device))[None]
        )[0]
        places_M = tokens_M.to(found_MY.device)  # a module may lie on another device
        result: torch.Tensor = (
            found_MY.new_zeros(shape_BT.numel(), found_MY.shape[-1])
            .index_copy(0, places_M, found_MY)
            .unflatten(0, shape_BT)
        )
        return result

    return sparse
