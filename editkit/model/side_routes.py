"""Which prompts are sent to what stands beside the weights.

Shape letters: B rows, T tokens, I input width of a module.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.beside import NONE
from editkit.model.capture import capture
from editkit.model.tokens import pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

TOKENS_AT_ONCE = 512


def routed(model: EditableModel, prompts: Sequence[Sequence[int]]) -> list[bool]:
    """Whether each prompt is sent to one of the model's sides. A pass ends at the last side."""
    modules = list(dict.fromkeys(side.module for side in model.sides))
    found = [False] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    while order and modules:
        rows = max(1, TOKENS_AT_ONCE // len(prompts[order[-1]]))
        chosen, order = order[-rows:], order[:-rows]
        texts = [prompts[index] for index in chosen]
        lengths = [len(ids) for ids in texts]
        batch = pad(texts, device=model.device, prompts=lengths)
        with torch.no_grad(), capture(model, inputs=modules) as captured:
            model.final_hidden(batch)
        rows_B, last_B = torch.arange(len(texts)), torch.tensor(lengths) - 1
        for side in model.sides:
            inputs_BTI = captured.inputs[side.module]
            choices_B = side.choose(inputs_BTI[rows_B.to(inputs_BTI.device), last_B])
            for index, choice in zip(chosen, choices_B.tolist(), strict=True):
                found[index] |= choice != NONE
    return found
