"""Efficacy, generalization, locality and losses of a hypernetwork's edits on validation
examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from editkit.hypernet.examples import Example
from editkit.hypernet.factors import (
    Questions,
    RowUpdates,
    gradient_factors,
    joined,
    log_probabilities,
    questions,
    row_updates,
)
from editkit.hypernet.losses import Edited, by_row, kept_answers, losses
from editkit.hypernet.network import Hypernetwork
from editkit.lazy import torch
from editkit.model.tokens import encode_with_targets

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

ROWS = 32  # edits or chains of edits that pass through the model together


def measure(
    model: EditableModel,
    network: Hypernetwork,
    chosen: Sequence[Example],
    *,
    sequence: int = 1,
    rows: int = ROWS,
) -> Mapping[str, float]:
    """Means over edits: the losses, and the shares of correct prompts, correct paraphrases and
    unchanged locality answers.

    Args:
        sequence: length of the chains of edits. All edits of a chain are measured after its last
            edit; 1 measures every edit alone.
        rows: number of chains that pass through the model together.
    """
    sums: dict[str, float] = {}
    num_chains = len(chosen) // sequence
    for start in range(0, num_chains, rows):
        links = [
            chosen[link * num_chains + start : link * num_chains + min(start + rows, num_chains)]
            for link in range(sequence)
        ]
        updates: RowUpdates | None = None
        for link in links:
            factors, _ = gradient_factors(
                model, network.modules, edits(model, link), earlier=updates
            )
            with torch.no_grad():
                updates = joined(updates, row_updates(network, factors))
        assert updates is not None
        for link in links:
            for name, value in measured(model, by_row(model, updates), link).items():
                sums[name] = sums.get(name, 0.0) + value
    return {name: value / (num_chains * sequence) for name, value in sums.items()}


def measured(model: EditableModel, edited: Edited, chosen: Sequence[Example]) -> dict[str, float]:
    """The sums over edits of what `measure` returns."""
    with torch.no_grad():
        loss = losses(model, edited, chosen)
        probes = [example.request.probe() for example in chosen]
        probes += [example.question for example in chosen]
        batch = questions(model, encode_with_targets(model.tokenizer, probes, chat=model.chat))
        with edited([*range(len(chosen)), *range(len(chosen))]):
            _, is_best = log_probabilities(model, batch)
        kept = kept_answers(model, edited, chosen)
    return {
        "edit_loss": float(loss.edit_B.sum()),
        "locality_loss": float(loss.locality_B.sum()),
        "efficacy": float(is_best[: len(chosen)].sum()),
        "generalization": float(is_best[len(chosen) :].sum()),
        "locality": float(kept.float().mean(dim=1).sum()),
    }


def edits(model: EditableModel, chosen: Sequence[Example]) -> Questions:
    """The prompts and targets of the edits, as the editor gets them."""
    probes = [example.request.probe() for example in chosen]
    return questions(model, encode_with_targets(model.tokenizer, probes, chat=model.chat))
