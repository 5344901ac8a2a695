"""MEMOIR's memory: a matrix beside one matrix, of which each edit reads and writes some columns.

An edit's columns are its mask. A prompt has a mask, too; it is sent to the edit whose mask shares
the largest part with its own, if that part is large enough. All masks are compared by one matrix
product.

Shape letters: N edits, P prompts, K columns of a mask, I and O input and output width of the
matrix, B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

from editkit.lazy import torch
from editkit.model.beside import NONE, AbstractSide, Place, Prompts, added_at
from editkit.types import TensorState


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskedMemory(AbstractSide):
    """A memory beside one module."""

    belongs: ClassVar[str] = "the memory belongs to a module"

    module: str
    least_overlap: float  # tau, the share of a mask's columns
    memory_OI: torch.Tensor  # M
    masks_NK: torch.Tensor  # int32: the columns of each edit
    mean_I: torch.Tensor  # of the background texts
    order_I: torch.Tensor  # int64: the fixed permutation

    def choose(self, prompts: Prompts) -> torch.Tensor:
        if not len(self.masks_NK):
            return torch.full((len(prompts),), NONE, device=prompts.ids_BT.device)
        with torch.no_grad():
            means_PI = prompts.means(prompts.tokens(prompts.inputs_BTI))
            overlaps_P, edits_P = self.overlaps(self.masks(means_PI)).max(dim=1)
        return torch.where(overlaps_P >= self.least_overlap, edits_P, NONE)

    def change(
        self,
        inputs_BTI: torch.Tensor,
        outputs_BTO: torch.Tensor,
        chosen_BT: torch.Tensor,
        place: Place,
    ) -> torch.Tensor:
        where_BT = chosen_BT != NONE
        if not bool(where_BT.any()):
            return outputs_BTO
        columns_XI = self._columns_NI[chosen_BT[where_BT]]
        added_XO = (inputs_BTI[where_BT].float() * columns_XI) @ self.memory_OI.T
        return added_at(outputs_BTO, where_BT, added_XO)

    def options(self) -> dict[str, Any]:
        return {"module": self.module, "least_overlap": self.least_overlap}

    def state(self) -> TensorState:
        return {
            "memory": self.memory_OI,
            "masks": self.masks_NK,
            "mean": self.mean_I,
            "order": self.order_I,
        }

    @classmethod
    def restored(cls, options: Mapping[str, Any], state: TensorState) -> Self:
        return cls(
            module=options["module"],
            least_overlap=options["least_overlap"],
            memory_OI=state["memory"],
            masks_NK=state["masks"],
            mean_I=state["mean"],
            order_I=state["order"],
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.memory_OI.shape[0], self.memory_OI.shape[1]

    def figures(self) -> dict[str, float]:
        return {
            "entries": float(len(self.masks_NK)),
            "parameters": float(self.memory_OI.numel()),
            "bytes": float(sum(tensor.nbytes for tensor in self.state().values())),
            "norm": float(self.memory_OI.double().norm()),
        }

    # Masks

    def masks(self, means_PI: torch.Tensor) -> torch.Tensor:
        """(P, K) int64: the columns of each prompt, from the mean of its tokens' inputs. They are
        the places to which the permutation takes the largest coordinates of the mean, without that
        of common text.
        """
        sizes_PI = (means_PI - self.mean_I).abs()
        return self.order_I[sizes_PI.topk(self.masks_NK.shape[1], dim=1).indices]

    def overlaps(self, masks_PK: torch.Tensor) -> torch.Tensor:
        """(P, N): the share of columns that a prompt has in common with each edit."""
        return self._marked(masks_PK) @ self._columns_NI.T / self.masks_NK.shape[1]

    @cached_property
    def _columns_NI(self) -> torch.Tensor:
        return self._marked(self.masks_NK)

    def _marked(self, masks_PK: torch.Tensor) -> torch.Tensor:
        """(P, I): 1 at the columns of a mask, 0 elsewhere."""
        zeros_PI = torch.zeros(len(masks_PK), self.memory_OI.shape[1], device=masks_PK.device)
        return zeros_PI.scatter(1, masks_PK.long(), 1.0)
