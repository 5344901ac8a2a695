"""MEND's two losses (Mitchell et al. 2022, section 3.3) of edited models:

    L = c_edit * -log p_edited(target | paraphrase) + c_loc * KL(p_base || p_edited)

The KL divergence is the mean over the tokens of the locality texts. Every edit has a model of its
own (MEND), or all of them are in one (MALMEN).

Shape letters: B edits, R factors, P positions, V vocabulary, L locality texts per edit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.hypernet.examples import Example
from editkit.hypernet.factors import RowUpdates, enter, log_probabilities, questions, rows_of
from editkit.lazy import torch
from editkit.model.tokens import encode_with_targets, pad
from editkit.types import Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


# By the rows of a batch, a context in which row i passes the edited model of `rows[i]`.
Edited = Callable[[Sequence[int]], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True, eq=False)
class Losses:
    """The losses of each edit, (B,) float32, in nats."""

    edit_B: torch.Tensor  # -log p of the targets after their paraphrases, mean over target tokens
    locality_B: torch.Tensor  # KL, mean over all tokens of the edit's locality texts


def by_row(model: EditableModel, updates: RowUpdates) -> Edited:
    """Models of which each has its own row of the updates."""

    @contextmanager
    def edited(rows: Sequence[int]) -> Iterator[None]:
        with ExitStack() as hooks:
            enter(hooks, model, rows_of(updates, rows))
            yield

    return edited


def losses(
    model: EditableModel,
    edited: Edited,
    examples: Sequence[Example],
    *,
    also: Sequence[tuple[int, Probe]] = (),
    base: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Losses:
    """The losses of the edited models. Gradients flow into their updates.

    Args:
        base: a context in which the model is the one whose predictions are to stay.
        also: further (row, prompt with its target) of earlier edits of a row's model. They have
            the same weight in the row's mean as the row's own edit.
    """
    probes = [*(example.question for example in examples), *(probe for _, probe in also)]
    rows = [*range(len(examples)), *(row for row, _ in also)]
    batch = questions(model, encode_with_targets(model.tokenizer, probes, chat=model.chat))
    with edited(rows):
        log_p, _ = log_probabilities(model, batch)
    index = torch.tensor(rows, device=model.device)
    counts_B = torch.bincount(index, minlength=len(examples))
    edit_B = torch.zeros(len(examples), device=model.device).index_add(0, index, -log_p) / counts_B
    return Losses(edit_B=edit_B, locality_B=_locality_loss(model, edited, examples, base))


def _locality_loss(
    model: EditableModel,
    edited: Edited,
    examples: Sequence[Example],
    base: Callable[[], AbstractContextManager[None]],
) -> torch.Tensor:
    """KL(p_base || p_edited) over the examples' locality texts, (B,)."""
    probes = [probe for example in examples for probe in example.locality]
    rows = [row for row, example in enumerate(examples) for _ in example.locality]
    batch = pad(
        [each.ids for each in encode_with_targets(model.tokenizer, probes, chat=model.chat)],
        device=model.device,
    )
    is_token_BT = batch.mask_BT.bool()
    with torch.no_grad(), base():
        base_PV = (
            model.hidden_to_logits(model.final_hidden(batch)[is_token_BT])
            .float()
            .log_softmax(dim=-1)
        )
    with edited(rows):
        edited_PV = (
            model.hidden_to_logits(model.final_hidden(batch)[is_token_BT])
            .float()
            .log_softmax(dim=-1)
        )
    kl_P = (base_PV.exp() * (base_PV - edited_PV)).sum(dim=-1)
    index_P = torch.tensor(rows, device=model.device).repeat_interleave(batch.mask_BT.sum(dim=1))
    sums_B = torch.zeros(len(examples), device=model.device).index_add(0, index_P, kl_P)
    return sums_B / torch.bincount(index_P, minlength=len(examples))


def kept_answers(model: EditableModel, edited: Edited, examples: Sequence[Example]) -> torch.Tensor:
    """Whether the most probable tokens at the positions of a locality text's answer are those of
    the unedited model, (B, L).
    """
    probes = [probe for example in examples for probe in example.locality]
    rows = [row for row, example in enumerate(examples) for _ in example.locality]
    batch = questions(model, encode_with_targets(model.tokenizer, probes, chat=model.chat))
    best = []
    for hooked in (nullcontext(), edited(rows)):
        with torch.no_grad(), hooked:
            hidden_BTD = model.final_hidden(batch.prompts)
            best.append(
                model.hidden_to_logits(hidden_BTD[batch.rows_P, batch.columns_P]).argmax(dim=-1)
            )
    same = (best[0] == best[1]).split(list(batch.lengths))
    is_kept = torch.stack([part.all() for part in same])
    is_kept_BL: torch.Tensor = is_kept.unflatten(0, (len(examples), -1))
    return is_kept_BL
