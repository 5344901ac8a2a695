"""MEMoE: experts beside one FFN matrix, chosen by knowledge anchors (Wang and Li 2024, arXiv
2405.19086).

    G = top_k(softmax(W_g [x; embed(anchor)] + noise))      Eqs. 9, 12; the noise while training
    h = W_0 x + lambda sum_e G_e W_e x                      Eqs. 10, 11; W_0 stays as it is

    loss     -log p(target token | prompt, target so far), mean over tokens, then over requests
             + balance * E sum_e f_e P_e
             f_e the share of tokens whose largest gate is e, P_e the mean gate (Switch Transformer,
             arXiv 2101.03961, Eqs. 4-6, the auxiliary loss that the paper names)

The router reads every token by itself. The anchor is one for each prompt: the mean of its tokens'
embeddings, found in the prompt's own tokens (`editkit.editors.anchors`), and it holds for the text
that follows. So batch, padding and cache change nothing. Without an anchor the router reads zeros.
Every prompt passes the experts, related or not, as in the paper; `scope=anchored`, which the paper
does not have, leaves prompts without an anchor alone.

A batch goes on from the experts and the router of the batches before it. The paper gives neither
lambda, learning rate, number of steps, noise, weight of the balance nor initialisation, and there
is no published code: the defaults are untuned, recipes are tuned. Several entities of a prompt are
averaged. The experts stand beside one matrix W_0; at the down projection they read the inner
activations.

Shape letters: I and O input and output width of the matrix, D width of embeddings, E experts,
N tokens of a pass, P prompts, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal, Self

from editkit.editors.anchors import Anchors, Kind
from editkit.editors.base import AbstractSideEditor, Plan, Step
from editkit.editors.beside import Matrix, layer_problems, matrix_beside, without_own
from editkit.editors.bypass import Bypass
from editkit.editors.ft import log_probabilities
from editkit.errors import OptionError, message, negative, not_positive
from editkit.lazy import torch
from editkit.model.beside import NONE, AbstractSide, Place, Prompts, added_at
from editkit.resources.workload import REQUEST, EditorMemory, Workload
from editkit.types import TensorState

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments


@dataclass(frozen=True, kw_only=True)
class MemoePlan(Plan):
    """The state with the batch's edits."""

    state: TensorState


@dataclass(frozen=True, kw_only=True)
class Memoe(AbstractSideEditor[MemoePlan]):
    """Bypass experts. The options are documented in `conf/editor/memoe.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    name: str
    layers: tuple[int, ...]
    matrix: Matrix
    experts: int
    top_k: int
    weight: float
    anchors: Kind
    scope: Literal["all", "anchored"]
    noise: float
    balance: float
    expert_std: float
    router_std: float
    steps: int
    lr: float
    stop_loss: float

    def __post_init__(self) -> None:
        problems = not_positive(self, "experts", "weight", "router_std", "steps", "lr")
        problems += layer_problems(self.layers)
        problems += negative(
            self, "noise", "balance", "expert_std", "stop_loss", expected="0 for none"
        )
        if not 1 <= self.top_k <= max(self.experts, 1):
            expected = f"1 to {self.experts}, the number of experts"
            problems.append(
                message("top_k", "so many experts cannot act", got=self.top_k, expected=expected)
            )
        if self.scope == "anchored" and self.anchors == "none":
            problem = "without anchors no prompt is in scope"
            fix = "set scope=all, or anchors=subject"
            problems.append(message("scope", problem, got=self.scope, fix=fix))
        if problems:
            raise OptionError(problems)

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """The matrix beside which the experts stand (`matrix_beside`)."""
        return (matrix_beside(model, self.layers, self.matrix),)

    def memory(self, work: Workload) -> EditorMemory:
        numbers = self.experts * (work.matrix + work.both)
        gradient = work.kept(REQUEST * work.batch_size, work.blocks_with_gradient)
        # The gradient, Adam's two moments, and the experts that are searched.
        working = 4 * 4 * numbers + gradient + work.logits(REQUEST * work.batch_size)
        return EditorMemory(working=working, beside=4 * numbers, columns_per_edit=0)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """Experts of zeros, or of noise in the size of W_0, and a router of noise."""
        (module,) = self.modules(model)
        weight_OI = model.weight(module)
        width = model.network.get_input_embeddings().weight.shape[1]
        router = torch.randn(self.experts, weight_OI.shape[1] + width) * self.router_std
        experts_EOI = torch.zeros(self.experts, *weight_OI.shape)
        if self.expert_std:
            size = self.expert_std * float(weight_OI.float().std())
            experts_EOI = torch.randn(experts_EOI.shape) * size
        anchors = Anchors.of(model, self.anchors).state()
        return {**anchors, "router": router, "experts": experts_EOI}

    def attach(self, model: EditableModel, state: TensorState) -> tuple[AbstractSide, ...]:
        return (self._bypass(model, state),)

    def plan(self, step: Step) -> MemoePlan:
        """Trains experts and router on the batch, from where the last batch left them."""
        model = step.model
        known = Anchors.restored(self.anchors, step.state).with_subjects(model, step.requests)
        state = {**step.state, **known.state()}
        learned = [
            state[name].to(model.device, torch.float32, copy=True).requires_grad_()
            for name in ("router", "experts")
        ]
        (module,) = self.modules(model)
        adam = torch.optim.Adam(learned, lr=self.lr, foreach=False)
        first, steps = None, 0
        run, bypass = log_probabilities(model, step.requests, "target"), self._bypass(model, state)
        with without_own(model, Bypass, module) as others:
            while True:
                with torch.enable_grad():
                    side = _Learned.of(model, bypass, learned, self.noise)
                    model.attach(*others, side)
                    log_p_B = run()
                    loss = -log_p_B.mean()
                    total = loss + self.balance * torch.stack(side.balances).mean()
                value = loss.item()
                first = log_p_B.detach() if first is None else first
                if not math.isfinite(value) or value < self.stop_loss or steps == self.steps:
                    break
                adam.zero_grad()
                total.backward()
                adam.step()
                steps += 1
        summary = {
            "probability_before": float(first.exp().mean()),
            "probability_after": float(log_p_B.detach().exp().mean()),
            "steps": float(steps),
            "loss": value,
        }
        router, experts_EOI = (tensor.detach().cpu() for tensor in learned)
        return MemoePlan(
            summary=summary,
            nonfinite=None if math.isfinite(value) else "loss",
            state={**state, "router": router, "experts": experts_EOI},
        )

    def propose(self, step: Step, plan: MemoePlan) -> TensorState:
        return plan.state

    def _bypass(self, model: EditableModel, state: TensorState) -> Bypass:
        (module,) = self.modules(model)
        columns = model.weight(module).shape[1]
        router = state["router"].to(model.device)
        embeddings_VD = model.network.get_input_embeddings().weight.float()
        return Bypass(
            module=module,
            top_k=self.top_k,
            weight=self.weight,
            only_anchored=self.scope == "anchored",
            anchors=Anchors.restored(self.anchors, state),
            router_EI=router[:, :columns],
            anchors_VE=embeddings_VD.to(model.device) @ router[:, columns:].T,
            experts_EOI=state["experts"].to(model.device),
        ).to(model.weight(module).device)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Learned(Bypass):
    """A bypass while its experts and its router are trained. Gradients flow into both parts of the
    router, the gates are noisy, and each pass leaves its auxiliary loss.
    """

    anchor_ED: torch.Tensor  # the part of W_g that reads the anchor
    embeddings_VD: torch.Tensor
    noise: float
    balances: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls, model: EditableModel, bypass: Bypass, learned: list[torch.Tensor], noise: float
    ) -> Self:
        """The bypass with these tensors: router and experts."""
        router, experts_EOI = learned
        columns = experts_EOI.shape[2]
        return cls(
            **{part.name: getattr(bypass, part.name) for part in fields(bypass)}
            | {"router_EI": router[:, :columns], "experts_EOI": experts_EOI},
            anchor_ED=router[:, columns:],
            embeddings_VD=model.network.get_input_embeddings().weight,
            noise=noise,
        )

    def choose(self, prompts: Prompts) -> torch.Tensor:
        found = [self.anchors.find(ids) for ids in prompts.ids()]
        zero_D = torch.zeros(self.embeddings_VD.shape[1], device=self.anchor_ED.device)
        means = [
            self.embeddings_VD[list(ids)].float().mean(0).to(zero_D) if ids else zero_D
            for ids in found
        ]
        anchored_PE = torch.stack(means) @ self.anchor_ED.T
        return self.choice(prompts.last_PI, anchored_PE, found)

    def change(
        self,
        inputs_BTI: torch.Tensor,
        outputs_BTO: torch.Tensor,
        chosen_BT: torch.Tensor,
        place: Place,
    ) -> torch.Tensor:
        is_sent_BT = chosen_BT[..., 0] != NONE
        inputs_NI = inputs_BTI[is_sent_BT].float()
        logits_NE = inputs_NI @ self.router_EI.T + chosen_BT[is_sent_BT][:, 1:]
        if self.noise:
            logits_NE = logits_NE + self.noise * torch.randn(logits_NE.shape).to(logits_NE)
        shares_NE = self.gates(logits_NE)
        self.balances.append(balance_loss(logits_NE.softmax(-1)))
        return added_at(outputs_BTO, is_sent_BT, self.mixed(inputs_NI, shares_NE))


def balance_loss(shares_NE: torch.Tensor) -> torch.Tensor:
    """E sum_e f_e P_e (Switch Transformer, Eqs. 4-6): 1 if the tokens are spread evenly, at most
    E. Gradients flow through the mean gates.
    """
    num = shares_NE.shape[1]
    largest_N = shares_NE.argmax(-1)
    counts_E = torch.nn.functional.one_hot(largest_N, num).float().mean(0)
    return num * (counts_E * shares_NE.mean(0)).sum()
