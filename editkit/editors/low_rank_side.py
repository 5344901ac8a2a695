"""An adapter beside one matrix: W x + up diag(scales) down x (Hu et al. 2021, arXiv 2106.09685).

Every token of every text goes through it. As in peft, it computes in the dtype of its own tensors,
float32, and rounds the sum once to that of the outputs.

Shape letters: R rank, I and O input and output width of the matrix, N any leading shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.model.beside import AbstractUnroutedSide
from editkit.types import TensorState


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRankSide(AbstractUnroutedSide):
    """The adapter of one matrix."""

    belongs: ClassVar[str] = "the adapter belongs to a matrix"

    module: str
    down_RI: torch.Tensor  # float32, as the others
    up_OR: torch.Tensor
    scales_R: torch.Tensor
    dropout: float = 0.0  # of its inputs; only while it is trained

    def changed(self, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        linear, inputs = torch.nn.functional.linear, inputs.to(self.down_RI)
        if self.dropout:
            inputs = torch.nn.functional.dropout(inputs, self.dropout)
        hidden_NR = linear(inputs, self.down_RI) * self.scales_R
        return (outputs + linear(hidden_NR, self.up_OR)).to(outputs.dtype)

    def options(self) -> dict[str, Any]:
        return {"module": self.module}

    def state(self) -> TensorState:
        return {"down": self.down_RI, "up": self.up_OR, "scales": self.scales_R}

    @classmethod
    def restored(cls, options: Mapping[str, Any], state: TensorState) -> Self:
        return cls(
            module=options["module"],
            down_RI=state["down"],
            up_OR=state["up"],
            scales_R=state["scales"],
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.up_OR.shape[0], self.down_RI.shape[1]

    def figures(self) -> dict[str, float]:
        tensors = self.state().values()
        return {
            "ranks": float(len(self.scales_R)),
            "parameters": float(sum(tensor.numel() for tensor in tensors)),
            "bytes": float(sum(tensor.nbytes for tensor in tensors)),
            "norm": self.product().frobenius(),
        }

    def product(self) -> LowRank:
        """What it adds to the matrix."""
        return LowRank(self.up_OR * self.scales_R, self.down_RI.T)

    def trimmed(self) -> LowRankSide:
        """Without the ranks that add nothing."""
        is_used_R = self.down_RI.any(1) & self.up_OR.any(0) & (self.scales_R != 0)
        return LowRankSide(
            module=self.module,
            down_RI=self.down_RI[is_used_R],
            up_OR=self.up_OR[:, is_used_R],
            scales_R=self.scales_R[is_used_R],
        )
