"""What MEND asks of the model: the factors of a request's gradient, and what the model says once
updates in factors are added to it.

A batch's rows are models of their own: row b sees its own updates and no other's, so that many
single edits share a pass. A gradient is never formed as a matrix, an update neither.

Shape letters: B rows, T tokens, P (row, position) pairs, V vocabulary, O d_out, I d_in, R factors
of an update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.hypernet.network import Factors, Hypernetwork
from editkit.lazy import torch
from editkit.model.capture import add_low_rank, capture_for_gradients
from editkit.model.tokens import PromptBatch, TargetSequence, pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

# The updates of each row by module: left (B, R, O) and right (B, R, I), left^T right.
RowUpdates = Mapping[str, tuple["torch.Tensor", "torch.Tensor"]]


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """Prompts with their targets, teacher-forced: the positions whose logits predict the targets'
    tokens.
    """

    batch: PromptBatch
    rows_P: torch.Tensor
    columns_P: torch.Tensor
    targets_P: torch.Tensor
    lengths: tuple[int, ...]  # tokens of each row's target


def questions(model: EditableModel, sequences: Sequence[TargetSequence]) -> Questions:
    """Puts them into one batch, without the last token, which predicts nothing."""
    batch = pad([sequence.ids[:-1] for sequence in sequences], device=model.device)
    lengths = tuple(len(sequence.target_ids) for sequence in sequences)
    columns = [
        position
        for sequence in sequences
        for position in range(sequence.start - 1, len(sequence.ids) - 1)
    ]
    return Questions(
        batch=batch,
        rows_P=torch.repeat_interleave(torch.arange(len(sequences)), torch.tensor(lengths)).to(
            model.device
        ),
        columns_P=torch.tensor(columns, device=model.device),
        targets_P=torch.tensor(
            [token for sequence in sequences for token in sequence.target_ids], device=model.device
        ),
        lengths=lengths,
    )


def log_probabilities(model: EditableModel, asked: Questions) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row's target, the mean over its tokens, (B,) float32 in nats; and whether every token
    of it is the likeliest one.
    """
    hidden_BTD = model.final_hidden(asked.batch)
    log_p_PV = (
        model.hidden_to_logits(hidden_BTD[asked.rows_P, asked.columns_P])
        .float()
        .log_softmax(dim=-1)
    )
    log_p_P = log_p_PV.gather(1, asked.targets_P[:, None])[:, 0]
    is_best_P = log_p_PV.detach().argmax(dim=-1) == asked.targets_P
    lengths = list(asked.lengths)
    return torch.stack([each.mean() for each in log_p_P.split(lengths)]), torch.stack(
        [each.all() for each in is_best_P.split(lengths)]
    )


def gradient_factors(
    model: EditableModel,
    modules: Sequence[str],
    asked: Questions,
    *,
    earlier: RowUpdates | None = None,
) -> tuple[dict[str, Factors], torch.Tensor]:
    """One pass forward and backward of -log p(target): each matrix's factors, (B, T, I) and (B, T,
    O), and log p by row.

    The loss is the mean over a target's tokens and the sum over rows, so that a row's factors do
    not depend on the other rows. `earlier` are updates that are in the row's model already.
    """
    with torch.enable_grad(), ExitStack() as hooks:
        enter(hooks, model, earlier)
        captured = hooks.enter_context(capture_for_gradients(model, modules))
        log_p_B, _ = log_probabilities(model, asked)
        gradients = torch.autograd.grad(
            -log_p_B.sum(), [captured.outputs[module] for module in modules]
        )
    counted_BT1 = asked.batch.mask_BT[..., None]
    return {
        module: Factors(
            captured.inputs[module].float() * counted_BT1, gradient_BTO.float() * counted_BT1
        )
        for module, gradient_BTO in zip(modules, gradients, strict=True)
    }, log_p_B.detach()


def row_updates(network: Hypernetwork, factors: Mapping[str, Factors]) -> RowUpdates:
    """What the hypernetwork makes of them, row by row."""
    return {module: network.transform(module, each) for module, each in factors.items()}


def rows_of(updates: RowUpdates, rows: Sequence[int]) -> RowUpdates:
    """The updates that row `rows[i]` has, for row i of another batch."""
    return {
        module: (left_BRO[list(rows)], right_BRI[list(rows)])
        for module, (left_BRO, right_BRI) in updates.items()
    }


def joined(first: RowUpdates | None, then: RowUpdates) -> RowUpdates:
    """Both, row by row."""
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
    """Adds updates to the model for as long as `hooks` lives."""
    for module, (left_BRO, right_BRI) in (updates or {}).items():
        hooks.enter_context(add_low_rank(model, module, left_BRO, right_BRI))
