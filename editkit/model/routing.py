"""Which experts the router of a mixture chooses.

Shape letters: B rows, T tokens, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.capture import capture_arguments
from editkit.model.tokens import pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


def routed_experts(
    model: EditableModel,
    layers: Sequence[int],
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> list[list[set[int]]]:
    """By text, then by layer: the experts that the router chooses at some positions.

    Args:
        texts: token ids, each with the positions.
    """
    names = [model.family.experts(layer) for layer in layers]
    batch = pad([ids for ids, _ in texts], device=model.device)
    with torch.no_grad(), capture_arguments(model, names) as arguments:
        model.final_hidden(batch)
    shape = batch.ids_BT.shape
    chosen = [arguments[name][1].cpu().unflatten(0, shape) for name in names]
    first = batch.first_B.tolist()
    return [
        [
            {
                expert
                for position in positions
                for expert in indices_BTK[row, first[row] + position].tolist()
            }
            for indices_BTK in chosen
        ]
        for row, (_, positions) in enumerate(texts)
    ]
