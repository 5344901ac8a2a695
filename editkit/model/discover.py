"""Which names an unknown architecture gives its modules, as far as their shapes show."""

from __future__ import annotations

from typing import Any

from editkit.lazy import torch
from editkit.model.families import Family
from editkit.model.network import empty_network


def suggestion(config: Any) -> list[str]:
    """For an unknown architecture: the names that seem to be right, as `model.family` takes them;
    no sentence where they do not show.
    """

    try:
        found = guess(empty_network(config))
    except (
        ValueError,
        RuntimeError,
        ImportError,
        AttributeError,
    ):  # no causal language model, or nothing that can be built here
        return []
    if found is None:
        return []
    names = ("base", "blocks", "final_norm", "mlp_in_block", "down_projection_in_block")
    given = ",".join(f"{name}:{getattr(found, name)}" for name in names)
    return [
        f"model.family: its modules look like model.family={{{given}}} - check that the MLP's "
        "output is added to the residual stream as it "
        "is (else add adds_mlp_output:false)."
    ]


def guess(network: torch.nn.Module) -> Family | None:
    """The names of an unknown architecture by their shapes; None where they do not show.

    The blocks are the longest list of modules; the down projection is a block's last matrix from a
    larger width to the residual one.
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
