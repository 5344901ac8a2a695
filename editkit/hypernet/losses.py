"""MEND's two losses (Mitchell et al. 2022, section 3.3) for many single edits, or chains of edits,
side by side.

    L = c_edit * -log p_edited(target | paraphrase) + c_loc * KL(p_base || p_edited), mean over the
    tokens of the locality texts

Shape letters: B edits, R factors, P positions, V vocabulary, L locality texts an edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.hypernet.examples import Example
from editkit.hypernet.factors import RowUpdates, enter, log_probabilities, questions, rows_of
from editkit.lazy import torch
from editkit.model.tokens import encode_with_targets, pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """By edit, (B,) float32, in nats."""

    edit_B: (
        torch.Tensor
    )  # -log p of the targets behind their paraphrases, mean over a target's tokens
    locality_B: torch.Tensor  # KL, mean over all tokens of the edit's locality texts


def losses(
    model: EditableModel,
    updates: RowUpdates,
    examples: Sequence[Example],
    *,
    also: Sequence[tuple[int, str, str]] = (),
) -> Losses:
    """What the edited models lose; gradients reach `updates`.

    `also` are further (row, prompt, target), of edits that a row's model got earlier: they count in
    the row's mean as its own does.
    """
    pairs = [(example.paraphrase, example.request.target) for example in examples] + [
        (prompt, target) for _, prompt, target in also
    ]
    rows = [*range(len(examples)), *(row for row, _, _ in also)]
    asked = questions(model, encode_with_targets(model.tokenizer, pairs))
    with ExitStack() as hooks:
        enter(hooks, model, rows_of(updates, rows))
        log_p, _ = log_probabilities(model, asked)
    index = torch.tensor(rows, device=model.device)
    counts_B = torch.bincount(index, minlength=len(examples))
    edit_B = torch.zeros(len(examples), device=model.device).index_add(0, index, -log_p) / counts_B
    return Losses(edit_B=edit_B, locality_B=locality_loss(model, updates, examples))


def locality_loss(
    model: EditableModel, updates: RowUpdates, examples: Sequence[Example]
) -> torch.Tensor:
    """(B,): KL(p_base || p_edited) over the examples' locality texts."""
    pairs = [(probe.prompt, probe.answer) for example in examples for probe in example.locality]
    rows = [row for row, example in enumerate(examples) for _ in example.locality]
    batch = pad(
        [sequence.ids for sequence in encode_with_targets(model.tokenizer, pairs)],
        device=model.device,
    )
    is_token_BT = batch.mask_BT.bool()
    with torch.no_grad():
        base_PV = (
            model.hidden_to_logits(model.final_hidden(batch)[is_token_BT])
            .float()
            .log_softmax(dim=-1)
        )
    with ExitStack() as hooks:
        enter(hooks, model, rows_of(updates, rows))
        edited_PV = (
            model.hidden_to_logits(model.final_hidden(batch)[is_token_BT])
            .float()
            .log_softmax(dim=-1)
        )
    kl_P = (base_PV.exp() * (base_PV - edited_PV)).sum(dim=-1)
    index_P = torch.tensor(rows, device=model.device).repeat_interleave(batch.mask_BT.sum(dim=1))
    sums_B = torch.zeros(len(examples), device=model.device).index_add(0, index_P, kl_P)
    return sums_B / torch.bincount(index_P, minlength=len(examples))


def kept_answers(
    model: EditableModel, updates: RowUpdates, examples: Sequence[Example]
) -> torch.Tensor:
    """(B, L): whether the likeliest tokens where a locality text's answer stands are those of the
    unedited model.
    """
    pairs = [(probe.prompt, probe.answer) for example in examples for probe in example.locality]
    rows = [row for row, example in enumerate(examples) for _ in example.locality]
    asked = questions(model, encode_with_targets(model.tokenizer, pairs))
    best = []
    for hooked in (None, rows_of(updates, rows)):
        with torch.no_grad(), ExitStack() as hooks:
            enter(hooks, model, hooked)
            hidden_BTD = model.final_hidden(asked.batch)
            best.append(
                model.hidden_to_logits(hidden_BTD[asked.rows_P, asked.columns_P]).argmax(dim=-1)
            )
    same = (best[0] == best[1]).split(list(asked.lengths))
    result: torch.Tensor = torch.stack([each.all() for each in same]).unflatten(
        0, (len(examples), -1)
    )
    return result
