"""Fine-tuning of matrices over epochs and mini-batches: what LocFT-BF and CrispEdit share.

Adam moves dW alone, and begins anew with each batch of edits. The loss of a mini-batch is the mean
over its requests of -log p of a target, itself a mean over the target's tokens.

Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.editors.base import Plan
from editkit.editors.ft import sequence_log_probabilities
from editkit.errors import message
from editkit.lazy import torch
from editkit.model.capture import add_to_matrix
from editkit.resources.workload import REQUEST, EditorMemory, Workload

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.model.tokens import TargetSequence

COPIES = 5  # of a matrix: dW, its gradient, Adam's two moments, and what the step works with
# A module and a matrix -> the matrix that takes its place
Change = Callable[[str, "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class FineTuned(Plan):
    """The updates of all modules, found together: (O, I) float32."""

    updates: Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Epochs:
    """How a batch of edits is trained."""

    number: int  # at most
    mini_batch: int  # requests of a step
    lr: float
    is_shuffled: bool  # anew for each epoch, by torch's global generator, as a checkpoint keeps it
    skip_loss: float  # of a mini-batch: below it no step is made
    stop_loss: float  # mean of an epoch: below it no further epoch begins

    def problems(self) -> list[str]:
        """What is out of range, as problems of an OptionError."""
        found = [
            message(name, "must be positive and finite", got=value)
            for name, value in (
                ("epochs", self.number),
                ("mini_batch", self.mini_batch),
                ("lr", self.lr),
            )
            if not 0 < value < math.inf
        ]
        return found + [
            message(name, "must not be negative", got=value, expected="0 for none")
            for name, value in (("skip_loss", self.skip_loss), ("stop_loss", self.stop_loss))
            if not 0 <= value < math.inf
        ]

    def memory(self, work: Workload) -> EditorMemory:
        """What training takes: dense updates, and a gradient for a mini-batch."""
        rows = REQUEST * min(self.mini_batch, work.batch_size)
        gradient = work.kept(rows, work.blocks_with_gradient) + work.logits(rows)
        return EditorMemory(
            working=COPIES * 4 * work.num_matrices * work.matrix + gradient,
            columns_per_edit=0,
            saving="a lower editor.mini_batch",
        )


def fine_tuned(
    model: EditableModel,
    modules: Sequence[str],
    sequences: Sequence[TargetSequence],
    epochs: Epochs,
    *,
    change: Change | None = None,
    changes: Literal["gradient", "step"] = "step",
) -> FineTuned:
    """Trains the matrices on the targets. The weights are only read.

    Args:
        change: replaces each gradient before Adam sees it, or each of Adam's steps.
    """
    updates = {
        module: torch.zeros(
            model.weight(module).shape,
            dtype=torch.float32,
            device=model.device,
            requires_grad=True,
        )
        for module in modules
    }
    # foreach off: the sum of two matrices of Adam's would be held a second time.
    adam = torch.optim.Adam(updates.values(), lr=epochs.lr, foreach=False)

    def log_probabilities(part: Sequence[TargetSequence]) -> torch.Tensor:
        with ExitStack() as added:
            for module, update_OI in updates.items():
                added.enter_context(add_to_matrix(model, module, update_OI))
            return sequence_log_probabilities(model, part)()

    def measured() -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([log_probabilities(part) for part in parts(range(len(sequences)))])

    def parts(order: Sequence[int]) -> list[list[TargetSequence]]:
        starts = range(0, len(order), epochs.mini_batch)
        return [[sequences[i] for i in order[s : s + epochs.mini_batch]] for s in starts]

    before_B, steps, mean = measured(), 0, math.nan
    for _ in range(epochs.number):
        number, total = len(sequences), 0.0
        order = torch.randperm(number).tolist() if epochs.is_shuffled else range(number)
        for part in parts(order):
            with torch.enable_grad():
                loss = -log_probabilities(part).mean()
            value = loss.item()
            total += value * len(part)
            if not math.isfinite(value):
                break
            if value >= epochs.skip_loss:
                adam.zero_grad()
                loss.backward()
                _take_step(adam, updates, change, changes)
                steps += 1
        mean = total / number
        if not math.isfinite(mean) or mean < epochs.stop_loss:
            break
    after_B = measured()
    return FineTuned(
        summary={
            "probability_before": float(before_B.exp().mean()),
            "probability_after": float(after_B.exp().mean()),
            "steps": float(steps),
            "loss": -float(after_B.mean()),
        },
        nonfinite=None if math.isfinite(mean) and bool(after_B.isfinite().all()) else "loss",
        updates={module: update_OI.detach() for module, update_OI in updates.items()},
    )


def _take_step(
    adam: torch.optim.Adam,
    updates: Mapping[str, torch.Tensor],
    change: Change | None,
    changes: Literal["gradient", "step"],
) -> None:
    if change is None:
        adam.step()
        return
    if changes == "gradient":
        for module, update_OI in updates.items():
            assert update_OI.grad is not None
            update_OI.grad.copy_(change(module, update_OI.grad))
        adam.step()
        return
    before = {module: update_OI.detach().clone() for module, update_OI in updates.items()}
    adam.step()
    with torch.no_grad():
        for module, update_OI in updates.items():
            update_OI.copy_(before[module] + change(module, update_OI - before[module]))
