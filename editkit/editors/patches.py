"""T-Patcher's patches as a side: neurons beside one MLP, each with a key, a bias and a value.

Shape letters: N patches, P prompts, B rows, T tokens, M tokens of any shape, I and O input and
output width of the MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from editkit.lazy import torch
from editkit.model.beside import NONE, AbstractSide, Place, Prompts, added_at
from editkit.types import TensorState

Activation = Literal["relu", "gelu"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Patches(AbstractSide):
    """Patches beside one MLP. They act at every token by itself. A prompt's choice is the patch
    with the largest signal at its last token, if that is positive: it is what routing measures.
    """

    belongs: ClassVar[str] = "the patches belong to a module"

    module: str
    activation: Activation
    keys_NI: torch.Tensor
    biases_N: torch.Tensor
    values_NO: torch.Tensor

    def __len__(self) -> int:
        return len(self.biases_N)

    def choose(self, prompts: Prompts) -> torch.Tensor:
        if not len(self):
            return torch.full((len(prompts),), NONE, device=prompts.ids_BT.device)
        with torch.no_grad():
            largest_P, patches_P = self.signals(prompts.last_PI).max(dim=1)
        return torch.where(largest_P > 0, patches_P, NONE)

    def change(
        self,
        inputs_BTI: torch.Tensor,
        outputs_BTO: torch.Tensor,
        chosen_BT: torch.Tensor,
        place: Place,
    ) -> torch.Tensor:
        if not len(self):
            return outputs_BTO
        acts_BTN = self.acts(self.signals(inputs_BTI))
        where_BT = (acts_BTN != 0).any(dim=-1)
        if not bool(where_BT.any()):
            return outputs_BTO
        return added_at(outputs_BTO, where_BT, acts_BTN[where_BT] @ self.values_NO)

    def signals(self, inputs_MI: torch.Tensor) -> torch.Tensor:
        """(M, N): q k + b, before the activation."""
        return inputs_MI.float() @ self.keys_NI.T + self.biases_N

    def acts(self, signals_MN: torch.Tensor) -> torch.Tensor:
        """(M, N): how strongly each patch acts."""
        functional = torch.nn.functional
        return (functional.relu if self.activation == "relu" else functional.gelu)(signals_MN)

    def added(self, inputs_MI: torch.Tensor) -> torch.Tensor:
        """(M, O): what the patches add to the MLP's outputs. Gradients flow."""
        return self.acts(self.signals(inputs_MI)) @ self.values_NO

    def options(self) -> dict[str, Any]:
        return {"module": self.module, "activation": self.activation}

    def state(self) -> TensorState:
        return {"keys": self.keys_NI, "biases": self.biases_N, "values": self.values_NO}

    @classmethod
    def restored(cls, options: Mapping[str, Any], state: TensorState) -> Self:
        return cls(
            module=options["module"],
            activation=options["activation"],
            keys_NI=state["keys"],
            biases_N=state["biases"],
            values_NO=state["values"],
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.values_NO.shape[1], self.keys_NI.shape[1]

    def figures(self) -> dict[str, float]:
        tensors = self.state().values()
        return {
            "entries": float(len(self)),
            "parameters": float(sum(tensor.numel() for tensor in tensors)),
            "bytes": float(sum(tensor.nbytes for tensor in tensors)),
            "norm": float(self.values_NO.double().norm()),
        }
