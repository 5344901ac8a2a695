"""Forward and backward passes for MEND: the factors of a request's gradient, and predictions with
updates in factors.

Every row of a batch is a separate model: row b has only its own updates, so that many single edits
share a pass. Neither a gradient nor an update is formed as a matrix.

Shape letters: B rows, T tokens, P (row, position) pairs, V vocabulary, O d_out, I d_in, R factors
of an update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.hypernet.abstract import Factors
from editkit.hypernet.network import Hypernetwork
from editkit.lazy import torch
from editkit.model.capture import add_low_rank, capture_for_gradients
from editkit.model.tokens import PromptBatch, TargetSequence, pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

# By module, the updates left^T right of each row: left (B, R, O) and right (B, R, I).
RowUpdates = Mapping[str, tuple["torch.Tensor", "torch.Tensor"]]


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """Prompts with their targets for teacher forcing, and the positions whose logits predict the
    targets' tokens.
    """

    prompts: PromptBatch
    rows_P: torch.Tensor
    columns_P: torch.Tensor
    targets_P: torch.Tensor
    lengths: tuple[int, ...]  # number of tokens of each row's target


def questions(model: EditableModel, sequences: Sequence[TargetSequence]) -> Questions:
    """The sequences as one batch, without their last tokens, whose logits are not needed."""
    batch = pad([sequence.ids[:-1] for sequence in sequences], device=model.device)
    lengths = tuple(len(sequence.target_ids) for sequence in sequences)
    columns = [
        position
        for sequence in sequences
        for position in range(sequence.start - 1, len(sequence.ids) - 1)
    ]
    return Questions(
        prompts=batch,
        rows_P=torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(lengths)).to(
            model.device
        ),
        columns_P=torch.tensor(columns, device=model.device),
        targets_P=torch.tensor(
            [token for sequence in sequences for token in sequence.target_ids], device=model.device
        ),
        lengths=lengths,
    )


def log_probabilities(model: EditableModel, batch: Questions) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean log-probability of each row's target tokens, (B,) float32 in nats, and whether all
    of them are the most probable tokens, (B,).
    """
    hidden_BTD = model.final_hidden(batch.prompts)
    log_p_PV = (
        model.hidden_to_logits(hidden_BTD[batch.rows_P, batch.columns_P])
        .float()
        .log_softmax(dim=-1)
    )
    log_p_P = log_p_PV.gather(1, batch.targets_P[:, None])[:, 0]
    is_best_P = log_p_PV.detach().argmax(dim=-1) == batch.targets_P
    lengths = list(batch.lengths)
    return torch.stack([part.mean() for part in log_p_P.split(lengths)]), torch.stack(
        [part.all() for part in is_best_P.split(lengths)]
    )


def gradient_factors(
    model: EditableModel,
    modules: Sequence[str],
    batch: Questions,
    *,
    earlier: RowUpdates | None = None,
) -> tuple[dict[str, Factors], torch.Tensor]:
    """The factors of each matrix, (B, T, I) and (B, T, O), and log p of each row's target, (B,),
    from one forward and backward pass of -log p.

    The loss is a mean over a target's tokens and a sum over rows, so that a row's factors do not
    depend on the other rows.

    Args:
        earlier: updates that each row's model already has.
    """
    with torch.enable_grad(), ExitStack() as hooks:
        enter(hooks, model, earlier)
        captured = hooks.enter_context(capture_for_gradients(model, modules))
        log_p_B, _ = log_probabilities(model, batch)
        gradients = torch.autograd.grad(
            -log_p_B.sum(), [captured.outputs[module] for module in modules]
        )
    counted_BT1 = batch.prompts.mask_BT[..., None]
    return {
        module: Factors(
            captured.inputs[module].float() * counted_BT1, gradient_BTO.float() * counted_BT1
        )
        for module, gradient_BTO in zip(modules, gradients, strict=True)
    }, log_p_B.detach()


def row_updates(network: Hypernetwork, factors: Mapping[str, Factors]) -> RowUpdates:
    """The updates that the hypernetwork computes from the factors, by row."""
    return {module: network.transform(module, own) for module, own in factors.items()}


def rows_of(updates: RowUpdates, rows: Sequence[int]) -> RowUpdates:
    """Updates for another batch, whose row i gets the updates of row `rows[i]`."""
    return {
        module: (left_BRO[list(rows)], right_BRI[list(rows)])
        for module, (left_BRO, right_BRI) in updates.items()
    }


def joined(first: RowUpdates | None, then: RowUpdates) -> RowUpdates:
    """The sum of two updates, row by row."""
    if first is None:
        return then
    return {
        module: tuple(
            torch.cat([before, after], dim=1)
            for before, after in zip(first[module], both, strict=True)
        )  # type: ignore[misc]
        for module, both in then.items()
    }


def enter(hooks: ExitStack, model: EditableModel, updates: RowUpdates | None) -> None:
    """Adds updates to the model until `hooks` is closed."""
    for module, (left_BRO, right_BRI) in (updates or {}).items():
        hooks.enter_context(add_low_rank(model, module, left_BRO, right_BRI))
