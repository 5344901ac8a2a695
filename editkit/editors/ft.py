"""FT: fine-tuning of matrices on the edit requests, held close to the weights.

    loss         value                                                             name
    target       -log p(target token | prompt, target so far), mean over tokens    FT-M (2308.07269)
    prompt_last  -log p(target token | prompt), for every token of the target      FT-L

FT-M is EasyEdit's (arXiv 2308.07269). FT-L is Zhu et al. 2020 (arXiv 2012.00363) as the code of
Meng et al. 2022 (arXiv 2202.05262) has it: it reads all tokens of a target from the one
distribution after the prompt, which is right for targets of one token alone. It is offered for
comparison.

Adam moves dW alone. After each step its entries are clipped to +- `norm_constraint`: W stays in an
L-infinity ball around the weights at the call, not around W_0. A batch has one loss, the mean over
its requests; published code splits it into chunks. The matrices of several layers move together.
The update is dense.

`l1` and `l2` add an elastic net on the update, summed over the matrices,

    loss + l1 * sum |dW| + l2 * |dW|_F^2       Xu et al. 2025 (EAC, arXiv 2503.00035), appendix E

in its plain form: EAC weighs it by the saliency of a target vector's coordinates, and FT searches
for no target vector. The equation was not checked against the appendix. The default is 0, no
elastic net. `stop_loss` is compared with the whole sum.

Shape letters: O d_out, I d_in, B requests, T tokens, M (request, position) pairs, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.base import AbstractEditor, Plan, Step
from editkit.errors import OptionError, message, negative
from editkit.lazy import torch
from editkit.model.capture import add_to_matrix
from editkit.model.tokens import TargetSequence, encode_with_targets, pad
from editkit.resources.workload import EditorMemory, Workload
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

Loss = Literal["target", "prompt_last"]


@dataclass(frozen=True, kw_only=True)
class FtPlan(Plan):
    """The updates of all modules, found together: (O, I) float32."""

    updates: Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Ft(AbstractEditor[FtPlan]):
    """Constrained fine-tuning. The options are documented in `conf/editor/ft.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    spans_devices: ClassVar[bool] = True
    needs_subject: ClassVar[bool] = False

    name: str
    layers: tuple[int, ...]
    objective: Loss
    steps: int  # of Adam, at most
    lr: float
    norm_constraint: float | None  # bound of each entry of |dW|; None: no bound
    stop_loss: float  # no further step is made below it
    l1: float  # of the elastic net on dW; 0: none
    l2: float

    def __post_init__(self) -> None:
        problems = [
            message(name, "must be positive", got=getattr(self, name))
            for name in ("steps", "lr")
            if not getattr(self, name) > 0
        ]
        if not self.layers or len(set(self.layers)) < len(self.layers):
            expected = "at least one layer, each once"
            problems.append(
                message("layers", "unusable layers", got=list(self.layers), expected=expected)
            )
        if self.norm_constraint is not None and not self.norm_constraint > 0:
            got, fix = self.norm_constraint, "set a positive bound, or null for none"
            problems.append(message("norm_constraint", "must be positive", got=got, fix=fix))
        problems += negative(self, "l1", "l2", expected="0 for none")
        if problems:
            raise OptionError(problems)

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        return model.down_projections(self.layers)

    def memory(self, work: Workload) -> EditorMemory:
        return replace(super().memory(work), columns_per_edit=0)

    def plan(self, step: Step) -> FtPlan:
        """Finds the updates. The weights are only read."""
        model = step.model
        log_probability = log_probabilities(model, step.requests, self.objective)
        updates = {
            module: torch.zeros(
                model.weight(module).shape,
                dtype=torch.float32,
                device=model.device,
                requires_grad=True,
            )
            for module in self.modules(model)
        }
        # foreach off: the sum of two matrices of Adam's would be held a second time.
        adam = torch.optim.Adam(updates.values(), lr=self.lr, foreach=False)
        before, steps = None, 0
        while True:
            with torch.enable_grad(), ExitStack() as added:
                for module, update_OI in updates.items():
                    added.enter_context(add_to_matrix(model, module, update_OI))
                log_p_B = log_probability()
                loss = -log_p_B.mean()
                if self.l1 or self.l2:
                    loss = loss + sum(
                        self.l1 * update_OI.abs().sum() + self.l2 * update_OI.square().sum()
                        for update_OI in updates.values()
                    )
            value = loss.item()
            before = log_p_B.detach() if before is None else before
            # Taken before each step and once behind the last, so that it belongs to the updates
            # that are returned.
            if not math.isfinite(value) or value < self.stop_loss or steps == self.steps:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            steps += 1
            if self.norm_constraint is not None:
                with torch.no_grad():
                    for update_OI in updates.values():
                        update_OI.clamp_(-self.norm_constraint, self.norm_constraint)
        summary = {
            "probability_before": float(before.exp().mean()),
            "probability_after": float(log_p_B.detach().exp().mean()),
            "steps": float(steps),
            "loss": value,
        }
        return FtPlan(
            summary=summary,
            nonfinite=None if math.isfinite(value) else "loss",
            updates={module: update_OI.detach() for module, update_OI in updates.items()},
        )

    def propose(self, step: Step, module: str, plan: FtPlan) -> torch.Tensor:
        return plan.updates[module]


def log_probabilities(
    model: EditableModel, requests: Sequence[EditRequest], loss: Loss
) -> Callable[[], torch.Tensor]:
    """`answers_log_probabilities` of the targets after their prompts."""
    return answers_log_probabilities(model, [request.probe() for request in requests], loss)


def answers_log_probabilities(
    model: EditableModel, probes: Sequence[Probe], loss: Loss = "target"
) -> Callable[[], torch.Tensor]:
    """A function that runs the network as it is then: the mean log-probability of an answer's token
    by probe, (B,) float32, in nats.
    """
    encoded = encode_with_targets(model.tokenizer, probes, chat=model.chat)
    return sequence_log_probabilities(model, encoded, loss)


def sequence_log_probabilities(
    model: EditableModel, encoded: Sequence[TargetSequence], loss: Loss = "target"
) -> Callable[[], torch.Tensor]:
    """`answers_log_probabilities` of prompts and answers that are tokenised already."""
    positions: Sequence[Sequence[int]]
    if loss == "target":
        rows = [sequence.ids[:-1] for sequence in encoded]
        positions = [range(sequence.start - 1, len(sequence.ids) - 1) for sequence in encoded]
    else:
        rows = [sequence.ids[: sequence.start] for sequence in encoded]
        positions = [(sequence.start - 1,) * len(sequence.target_ids) for sequence in encoded]
    prompts = [sequence.start for sequence in encoded]
    batch = pad(rows, device=model.device, prompts=prompts)
    lengths = [len(sequence.target_ids) for sequence in encoded]
    rows_M = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths)).to(
        model.device
    )
    columns_M = batch.first_B[rows_M] + torch.tensor(
        [position for of_row in positions for position in of_row], device=model.device
    )
    targets_M = torch.tensor(
        [token for sequence in encoded for token in sequence.target_ids], device=model.device
    )

    def run() -> torch.Tensor:
        hidden_BTD = model.final_hidden(batch)
        log_p_MV = model.hidden_to_logits(hidden_BTD[rows_M, columns_M]).float().log_softmax(dim=-1)
        log_p_M = log_p_MV.gather(1, targets_M[:, None])[:, 0]
        return torch.stack([tokens.mean() for tokens in log_p_M.split(lengths)])

    return run
