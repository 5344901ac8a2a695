"""What a hypernetwork's edits achieve, on examples that it was not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from editkit.hypernet.examples import Example
from editkit.hypernet.factors import (
    Questions,
    RowUpdates,
    enter,
    gradient_factors,
    joined,
    log_probabilities,
    questions,
    row_updates,
)
from editkit.hypernet.losses import kept_answers, losses
from editkit.hypernet.network import Hypernetwork
from editkit.lazy import torch
from editkit.model.tokens import encode_with_targets

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

ROWS = 32  # edits, or chains of them, that go through the model together


def measure(
    model: EditableModel,
    network: Hypernetwork,
    chosen: Sequence[Example],
    *,
    sequence: int = 1,
    rows: int = ROWS,
) -> Mapping[str, float]:
    """Means over edits: losses, and the shares of prompts, paraphrases and locality answers that
    are as they should be.

    Every edit alone, or, with `sequence`, in chains of so many, all of them measured when their
    chain is complete. `rows` chains go through the model together.
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
            for name, value in _measured(model, updates, link).items():
                sums[name] = sums.get(name, 0.0) + value
    return {name: value / (num_chains * sequence) for name, value in sums.items()}


def _measured(
    model: EditableModel, updates: RowUpdates, chosen: Sequence[Example]
) -> dict[str, float]:
    """Sums over edits."""
    with torch.no_grad():
        found = losses(model, updates, chosen)
        pairs = [(example.request.full_prompt, example.request.target) for example in chosen]
        pairs += [(example.paraphrase, example.request.target) for example in chosen]
        asked = questions(model, encode_with_targets(model.tokenizer, pairs))
        with ExitStack() as hooks:
            enter(
                hooks,
                model,
                {
                    name: (left.repeat(2, 1, 1), right.repeat(2, 1, 1))
                    for name, (left, right) in updates.items()
                },
            )
            _, is_best = log_probabilities(model, asked)
        kept = kept_answers(model, updates, chosen)
    return {
        "edit_loss": float(found.edit_B.sum()),
        "locality_loss": float(found.locality_B.sum()),
        "efficacy": float(is_best[: len(chosen)].sum()),
        "generalization": float(is_best[len(chosen) :].sum()),
        "locality": float(kept.float().mean(dim=1).sum()),
    }


def edits(model: EditableModel, chosen: Sequence[Example]) -> Questions:
    """The edits' own prompts, as the editor will be given them."""
    return questions(
        model,
        encode_with_targets(
            model.tokenizer, [(each.request.full_prompt, each.request.target) for each in chosen]
        ),
    )
