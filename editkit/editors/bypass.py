"""MEMoE's bypass as a side: experts beside one matrix, and the router that chooses among them.

Shape letters: B rows, T tokens, N tokens of a pass, P prompts, I and O input and output width of
the matrix, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from editkit.editors.anchors import Anchors, Ids
from editkit.lazy import torch
from editkit.model.beside import NONE, AbstractSide, Place, Prompts, added_at
from editkit.types import TensorState


@dataclass(frozen=True, eq=False, kw_only=True)
class Bypass(AbstractSide):
    """Experts beside one module. A choice is (P, 1 + E): the expert at the prompt's last token, and
    what the anchor adds to the router's logits.
    """

    belongs: ClassVar[str] = "the experts belong to a module"

    module: str
    top_k: int
    weight: float  # lambda of Eq. 11
    only_anchored: bool  # whether prompts without an anchor are left alone
    anchors: Anchors
    router_EI: torch.Tensor  # the part of W_g that reads a token
    anchors_VE: torch.Tensor  # the part of W_g that reads the anchor, times each token's embedding
    experts_EOI: torch.Tensor

    # As a side

    def choose(self, prompts: Prompts) -> torch.Tensor:
        found = [self.anchors.find(ids) for ids in prompts.ids()]
        rows = [
            self.anchors_VE[list(ids)].mean(0) if ids else self.anchors_VE.new_zeros(self.num)
            for ids in found
        ]
        return self.choice(prompts.last_PI, torch.stack(rows), found)

    def change(
        self,
        inputs_BTI: torch.Tensor,
        outputs_BTO: torch.Tensor,
        chosen_BT: torch.Tensor,
        place: Place,
    ) -> torch.Tensor:
        is_sent_BT = chosen_BT[..., 0] != NONE
        if not bool(is_sent_BT.any()):
            return outputs_BTO
        inputs_NI = inputs_BTI[is_sent_BT].float()
        shares_NE = self.gates(inputs_NI @ self.router_EI.T + chosen_BT[is_sent_BT][:, 1:])
        return added_at(outputs_BTO, is_sent_BT, self.mixed(inputs_NI, shares_NE))

    def options(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "top_k": self.top_k,
            "weight": self.weight,
            "only_anchored": self.only_anchored,
            "anchors": self.anchors.kind,
        }

    def state(self) -> TensorState:
        return {
            **self.anchors.state(),
            "router": self.router_EI,
            "anchors": self.anchors_VE,
            "experts": self.experts_EOI,
        }

    @classmethod
    def restored(cls, options: Mapping[str, Any], state: TensorState) -> Self:
        return cls(
            **{name: options[name] for name in ("module", "top_k", "weight", "only_anchored")},
            anchors=Anchors.restored(options["anchors"], state),
            router_EI=state["router"],
            anchors_VE=state["anchors"],
            experts_EOI=state["experts"],
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.experts_EOI.shape[1], self.experts_EOI.shape[2]

    def figures(self) -> dict[str, float]:
        tensors = self.state().values()
        return {
            "entries": float(self.num),
            "parameters": float(self.experts_EOI.numel() + self.router_EI.numel()),
            "bytes": float(sum(tensor.nbytes for tensor in tensors)),
            "norm": float(self.experts_EOI.double().norm()),
        }

    # Its parts

    @property
    def num(self) -> int:
        """E."""
        return len(self.experts_EOI)

    def choice(
        self, last_PI: torch.Tensor, anchored_PE: torch.Tensor, found: list[Ids]
    ) -> torch.Tensor:
        """The choices, from what the anchors add to the router's logits."""
        logits_PE = last_PI.float() @ self.router_EI.T + anchored_PE
        expert_P1 = logits_PE.detach().argmax(1, keepdim=True).to(anchored_PE)
        if self.only_anchored:
            is_alone_P1 = torch.tensor([[not ids] for ids in found], device=expert_P1.device)
            expert_P1 = expert_P1.masked_fill(is_alone_P1, NONE)
        return torch.cat([expert_P1, anchored_PE], dim=1)

    def gates(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """(N, E): each expert's share, 0 for all but the largest (Eq. 9)."""
        shares_NE = logits_NE.softmax(-1)
        kept_NK = shares_NE.topk(self.top_k, dim=-1).indices
        return shares_NE * torch.zeros_like(shares_NE).scatter(1, kept_NK, 1.0)

    def mixed(self, inputs_NI: torch.Tensor, shares_NE: torch.Tensor) -> torch.Tensor:
        """(N, O): lambda sum_e G_e W_e x (Eqs. 10, 11). An expert runs at its own tokens alone."""
        mixed_NO = inputs_NI.new_zeros(len(inputs_NI), self.experts_EOI.shape[1])
        for expert, expert_OI in enumerate(self.experts_EOI):
            [rows_M] = torch.where(shares_NE[:, expert] > 0)
            shares_M1 = shares_NE[rows_M, expert, None]
            mixed_NO = mixed_NO.index_add(0, rows_M, shares_M1 * (inputs_NI[rows_M] @ expert_OI.T))
        return self.weight * mixed_NO
