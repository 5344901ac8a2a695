"""The module names of an unknown architecture, guessed from the shapes of its modules."""

from __future__ import annotations

from typing import Any

from editkit.errors import message
from editkit.lazy import torch
from editkit.model.families import Family
from editkit.model.network import empty_network


def family_suggestion(config: Any) -> list[str]:
    """A message with the guessed value of `model.family`; empty if there is no guess."""
    try:
        family = guess_family(empty_network(config))
    # The config is not of a causal language model, or the network cannot be built here.
    except (ValueError, RuntimeError, ImportError, AttributeError):
        return []
    if family is None:
        return []
    names = ("base", "blocks", "final_norm", "mlp_in_block", "down_projection_in_block")
    value = ",".join(f"{name}:{getattr(family, name)}" for name in names)
    return [
        message(
            "model.family",
            "the modules of the network suggest a value",
            fix=f"try model.family={{{value}}}, with adds_mlp_output:false unless the MLP's output "
            "is added to the residual stream unchanged",
        )
    ]


def guess_family(network: torch.nn.Module) -> Family | None:
    """The module names of an unknown architecture; None if the shapes do not determine them.

    The blocks are the longest list of modules. The down projection is a block's last matrix from a
    larger width to the residual width.
    """
    from transformers.pytorch_utils import Conv1D

    lists = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module)
    }
    if not lists:
        return None
    blocks = max(lists, key=lambda name: (len(lists[name]), -len(name)))
    base, block = blocks.rpartition(".")[0], lists[blocks][0]
    width = network.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    downs = []
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            shape = tuple(module.weight.shape)
            outputs, inputs = shape[::-1] if isinstance(module, Conv1D) else shape
            if outputs == width and inputs > width:
                downs.append(name)
    after = list(network.get_submodule(base).named_children()) if base else []
    norms = [name for name, module in after if "norm" in type(module).__name__.lower()]
    if not downs or not norms:
        return None
    down = downs[-1]
    mlp = down.rpartition(".")[0] or down
    return Family(
        base=base,
        blocks=blocks,
        final_norm=f"{base}.{norms[-1]}",
        mlp_in_block=mlp,
        down_projection_in_block=down,
    )
