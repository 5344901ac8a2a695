"""Beginnings that several sequences have in common: run once for all of them.

The requests of a batch are put behind the same sampled texts; what the network makes of those does
not depend on what follows.

Shape letters: B sequences, G different beginnings, P their tokens (padded on the left), H heads, E
head width.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.sparse import at_tokens, sparse_modules
from editkit.model.tokens import pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

LEAST_TOKENS = 64  # saved: for fewer an extra pass does not pay


@dataclass(frozen=True, kw_only=True, eq=False)
class Shared:
    """The common beginnings of some sequences, and what the network made of them."""

    lengths: tuple[int, ...]  # by sequence, in tokens; 0: nothing is shared
    mask_BP: torch.Tensor
    own_B: torch.Tensor  # which beginning is a sequence's
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # keys and values of each, (G, H, P, E)

    @property
    def num_columns(self) -> int:
        return self.mask_BP.shape[1]

    def keys_and_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, P, E) each."""
        keys_GHPE, values_GHPE = self.layers[layer]
        own_B = self.own_B.to(keys_GHPE.device)  # a layer may lie on another device
        return keys_GHPE[own_B], values_GHPE[own_B]


def share(
    model: EditableModel,
    sequences: Sequence[Sequence[int]],
    limits: Sequence[int],
    groups: Sequence[Hashable] | None,
) -> Shared | None:
    """Runs what the sequences of each group have in common, if that pays; at most `limits` tokens
    of a sequence.
    """
    lengths = (
        common_lengths(sequences, limits, groups) if groups is not None else [0] * len(sequences)
    )
    beginnings = {
        tuple(ids[:length]): None for ids, length in zip(sequences, lengths, strict=True) if length
    }
    if sum(lengths) - sum(map(len, beginnings)) < LEAST_TOKENS:
        return None
    from transformers import DynamicCache

    batch, cache = pad(list(beginnings), device=model.device, side="left"), DynamicCache()
    sparse = sparse_modules(model, range(model.num_layers), batch.mask_BT.cpu().bool())
    stop = capture(
        model, inputs=[model.family.mlp(model.num_layers - 1)]
    )  # by then all keys and values are known
    with torch.no_grad(), stop, at_tokens(sparse):
        model.module(model.family.base)(**batch.arguments, past_key_values=cache, use_cache=True)
    places = {ids: place for place, ids in enumerate(beginnings)}
    own_B = torch.tensor(
        [
            places.get(tuple(ids[:length]), 0)
            for ids, length in zip(sequences, lengths, strict=True)
        ],
        device=model.device,
    )
    has_any_B1 = torch.tensor(lengths, device=model.device)[:, None] > 0
    layers: Any = cache.layers
    return Shared(
        lengths=tuple(lengths),
        mask_BP=batch.mask_BT[own_B] * has_any_B1,
        own_B=own_B,
        layers=tuple((layer.keys, layer.values) for layer in layers),
    )


def common_lengths(
    sequences: Sequence[Sequence[int]], limits: Sequence[int], groups: Sequence[Hashable]
) -> list[int]:
    """By sequence, how many tokens at its beginning it has in common with all of its group; never
    more than any of their limits.
    """
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    found = [0] * len(sequences)
    for places in members.values():
        if len(places) > 1:
            longest = min(limits[place] for place in places)
            columns = zip(*(sequences[place][:longest] for place in places), strict=True)
            same = next(
                (index for index, column in enumerate(columns) if len(set(column)) > 1), longest
            )
            for place in places:
                found[place] = same
    return found
