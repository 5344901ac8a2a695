"""The Kronecker factors of the curvature of a language model's loss: sums of x x^T over the inputs
of a matrix, and of g g^T over the gradients of its outputs.

The loss is the sum of -log p over the predicted tokens. Gradients are those of the true next
tokens, and every position counts that is not padding.

Shape letters: O d_out, I d_in, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.hypernet.factors import log_probabilities, questions
from editkit.lazy import torch
from editkit.model.capture import capture_for_gradients
from editkit.model.tokens import Encoded, TargetSequence, encode

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.types import TensorState

ROWS = 8  # texts of a pass


@dataclass(frozen=True, slots=True, eq=False)
class Curvature:
    """The sums of one matrix in float64, and the number of tokens. Immutable."""

    inputs_II: torch.Tensor
    gradients_OO: torch.Tensor
    tokens: float

    def __add__(self, other: Curvature) -> Curvature:
        return Curvature(
            self.inputs_II.to(other.inputs_II) + other.inputs_II,
            self.gradients_OO.to(other.gradients_OO) + other.gradients_OO,
            self.tokens + other.tokens,
        )

    def to(self, device: torch.device | str) -> Curvature:
        """The same sums on another device."""
        return Curvature(self.inputs_II.to(device), self.gradients_OO.to(device), self.tokens)

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors for a checkpoint."""
        tokens = torch.tensor(self.tokens, dtype=torch.float64)
        parts = {"inputs": self.inputs_II, "gradients": self.gradients_OO, "tokens": tokens}
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    @classmethod
    def from_state(cls, name: str, state: TensorState) -> Curvature:
        """The inverse of `state`."""
        inputs_II, gradients_OO = state[f"{name}.inputs"], state[f"{name}.gradients"]
        return cls(inputs_II, gradients_OO, float(state[f"{name}.tokens"]))


def curvature(
    model: EditableModel, modules: Sequence[str], sequences: Sequence[TargetSequence]
) -> Mapping[str, Curvature]:
    """The sums by matrix over prompts with their targets, whose tokens are predicted."""
    total: dict[str, Curvature] = {}
    for start in range(0, len(sequences), ROWS):
        texts = questions(model, sequences[start : start + ROWS])
        with torch.enable_grad(), capture_for_gradients(model, modules) as captured:
            log_p_B, _ = log_probabilities(model, texts)
            lengths_B = torch.tensor(texts.lengths, device=log_p_B.device)
            loss = -(log_p_B * lengths_B).sum()
            outputs = [captured.outputs[module] for module in modules]
            gradients = torch.autograd.grad(loss, outputs)
        counts_BT = texts.prompts.mask_BT.bool()
        for module, gradient_BTO in zip(modules, gradients, strict=True):
            inputs_TI = captured.inputs[module][counts_BT].double()
            gradients_TO = gradient_BTO[counts_BT].double()
            part = Curvature(
                inputs_TI.T @ inputs_TI, gradients_TO.T @ gradients_TO, float(len(inputs_TI))
            )
            total[module] = total[module] + part if module in total else part
    return total


def text_sequences(model: EditableModel, texts: Sequence[str], length: int) -> list[TargetSequence]:
    """The texts as sequences that predict all their tokens but the first, cut to `length` tokens.
    Texts of a single token are left out.
    """
    cut = [
        Encoded(each.ids[:length], each.spans[:length], each.num_special)
        for each in encode(model.tokenizer, texts)
    ]
    return [TargetSequence(each, 1) for each in cut if len(each.ids) > 1]
