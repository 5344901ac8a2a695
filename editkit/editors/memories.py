"""WISE's side memories: copies of one matrix, and which prompts they answer.

A memory is kept as its difference to the matrix, W' - W. A prompt's distance is the mean over its
tokens of |W' x - W x|: what the memory would change. It is sent to the memory with the largest
distance, if that is larger than a share of the smallest distance of the memory's own edits.

Shape letters: K memories, P prompts, N tokens of all prompts, B rows, T tokens, I and O input and
output width of the matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from editkit.lazy import torch
from editkit.model.beside import NONE, AbstractSide, Place, Prompts
from editkit.types import TensorState


@dataclass(frozen=True, eq=False, kw_only=True)
class Memories(AbstractSide):
    """Memories beside one module."""

    belongs: ClassVar[str] = "the side memory belongs to a module"

    module: str
    act_ratio: float
    differences_KOI: torch.Tensor
    least_K: torch.Tensor  # the smallest distance of a memory's edits

    def choose(self, prompts: Prompts) -> torch.Tensor:
        with torch.no_grad():
            distances_NK = self.distances(prompts.tokens(prompts.inputs_BTI))
            distances_PK = prompts.means(distances_NK)
        largest_P, memories_P = distances_PK.max(dim=1)
        is_sent_P = largest_P > self.act_ratio * self.least_K[memories_P]
        return torch.where(is_sent_P, memories_P, NONE)

    def change(
        self,
        inputs_BTI: torch.Tensor,
        outputs_BTO: torch.Tensor,
        chosen_BT: torch.Tensor,
        place: Place,
    ) -> torch.Tensor:
        if not bool((chosen_BT != NONE).any()):
            return outputs_BTO
        changed_BTO = outputs_BTO.clone()
        for memory in chosen_BT.unique().tolist():
            if memory != NONE:
                where_BT, difference_OI = chosen_BT == memory, self.differences_KOI[memory]
                added = inputs_BTI[where_BT].float() @ difference_OI.T
                changed_BTO[where_BT] += added.to(outputs_BTO)
        return changed_BTO

    def options(self) -> dict[str, Any]:
        return {"module": self.module, "act_ratio": self.act_ratio}

    def state(self) -> TensorState:
        return {"differences": self.differences_KOI, "least": self.least_K}

    @classmethod
    def restored(cls, options: Mapping[str, Any], state: TensorState) -> Self:
        return cls(
            module=options["module"],
            act_ratio=options["act_ratio"],
            differences_KOI=state["differences"],
            least_K=state["least"],
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.differences_KOI.shape[1], self.differences_KOI.shape[2]

    def figures(self) -> dict[str, float]:
        return {
            "entries": float(len(self.least_K)),
            "parameters": float(self.differences_KOI.numel()),
            "bytes": float(sum(tensor.nbytes for tensor in self.state().values())),
            "norm": float(self.differences_KOI.double().norm()),
        }

    def distances(self, inputs_NI: torch.Tensor) -> torch.Tensor:
        """(N, K): how far each memory moves the output of each token. Gradients flow."""
        rows_NR = inputs_NI.float() @ self.differences_KOI.flatten(0, 1).T
        distances_NK: torch.Tensor = rows_NR.unflatten(1, self.differences_KOI.shape[:2]).norm(
            dim=-1
        )
        return distances_NK
