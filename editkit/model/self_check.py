"""Scoring and generation beside the network itself, on a few short texts.

Shape letters: B rows, T tokens, D width of the residual stream, V vocabulary, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.continuation import CachedContinuation, Continuation
from editkit.model.prefix_tree import build_trees, supports_trees, tree_batch
from editkit.model.shortcuts import Comparison, attempted, compared, difference, tolerance_of
from editkit.model.tokens import pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

STEPS = 3  # of the generation that is compared
LONGEST = 64  # tokens of the compared text, which bound the time of a check


def require_own_logits(model: EditableModel, ids: Sequence[int]) -> None:
    """Raises ConfigError if the base network and the head do not give the network's own logits:
    a wrong `base` in the module names.
    """
    batch = pad([ids[:LONGEST]], device=model.device)
    with torch.no_grad():
        ours_TV = model.hidden_to_logits(model.final_hidden(batch)[0])
        own_TV = model.network(**batch.arguments, use_cache=False).logits[0].to(ours_TV.device)
    if difference(ours_TV, own_TV) > tolerance_of(model.dtype):
        raise ConfigError(
            message(
                "model.family",
                f"the head of {model.name} does not read the output of the base network",
                got=model.family.base,
                fix="set base in model.family to the network that ends with the final norm",
            )
        )


def compare_scoring(model: EditableModel, ids: Sequence[int]) -> Comparison | None:
    """Final hidden states of texts with a common beginning, as one tree and in rows of their own;
    None if the model is not scored with trees.
    """
    ids = tuple(ids[:LONGEST])
    if len(ids) < 3 or not supports_trees(model, longest=len(ids)):
        return None
    middle = len(ids) // 2
    texts = [ids, (*ids[:middle], *reversed(ids[middle:])), (*ids[:middle], ids[0])]
    [tree] = build_trees(texts, limit=3 * len(ids))

    def at_once() -> dict[str, torch.Tensor]:
        batch = tree_batch([tree], device=model.device, dtype=model.dtype)
        tree_TD = model.final_hidden(batch)[0]
        return {"hidden": torch.cat([tree_TD[list(path)] for path in tree.paths])}

    with torch.no_grad():
        ours = attempted(at_once)
        rows_BTD = model.final_hidden(pad(tree.sequences, device=model.device))
    plain = [rows_BTD[row, : len(path)] for row, path in enumerate(tree.paths)]
    return compared("scoring", ours, {"hidden": torch.cat(plain)}, dtype=model.dtype)


def compare_generation(model: EditableModel, ids: Sequence[int]) -> Comparison:
    """Final hidden states of two texts of different lengths while tokens are appended: with a
    cache, and from one pass over all tokens, where no token sees a later one.
    """
    ids = tuple(ids[: min(LONGEST, model.max_length - STEPS)])
    rows = [ids, ids[: max(1, len(ids) // 2)]]
    ours = attempted(lambda: _appended(CachedContinuation(model, rows), ids[:STEPS]))
    plain = _at_once(model, rows, ids[:STEPS])
    return compared("generation", ours, plain, dtype=model.dtype)


def _appended(text: Continuation, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
    """(S, B, D): the last hidden states after each of these tokens was appended to both rows."""
    states = []
    with torch.no_grad():
        for token in tokens:
            states.append(text.last_hidden())
            token_B = torch.full((2,), token, device=states[-1].device)
            text.append(token_B, torch.zeros_like(token_B, dtype=torch.bool))
        states.append(text.last_hidden())
    return {"hidden": torch.stack(states)}


def _at_once(
    model: EditableModel, rows: Sequence[Sequence[int]], tokens: Sequence[int]
) -> dict[str, torch.Tensor]:
    """The same from one pass."""
    with torch.no_grad():
        batch = pad([(*row, *tokens) for row in rows], device=model.device)
        hidden_BTD = model.final_hidden(batch)
    ends = [
        hidden_TD[len(row) - 1 : len(row) + len(tokens)]
        for row, hidden_TD in zip(rows, hidden_BTD, strict=True)
    ]
    return {"hidden": torch.stack(ends, dim=1)}
