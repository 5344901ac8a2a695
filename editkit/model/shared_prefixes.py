"""Common prefixes of several sequences, which run once for all of them.

The requests of a batch follow the same sampled contexts. The keys and values of a context do not
depend on the tokens after it.

Shape letters: B sequences, G distinct prefixes, P their tokens (padded on the left), H heads, E
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

LEAST_TOKENS = 64  # an extra pass must save at least this many tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedPrefixes:
    """The common prefixes of some sequences with their keys and values."""

    lengths: tuple[int, ...]  # by sequence, in tokens; 0 without a shared prefix
    mask_BP: torch.Tensor
    own_B: torch.Tensor  # by sequence, the index of its prefix
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # keys and values of each, (G, H, P, E)

    @property
    def num_columns(self) -> int:
        return self.mask_BP.shape[1]

    def keys_and_values(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, (B, H, P, E) each."""
        keys_GHPE, values_GHPE = self.layers[layer]
        own_B = self.own_B.to(keys_GHPE.device)  # a layer may lie on another device
        return keys_GHPE[own_B], values_GHPE[own_B]


def share_prefixes(
    model: EditableModel,
    sequences: Sequence[Sequence[int]],
    limits: Sequence[int],
    groups: Sequence[Hashable] | None,
    *,
    least_shared: int | None = None,
) -> SharedPrefixes | None:
    """Runs the common prefix of each group of sequences; None if that saves fewer tokens than
    `least_shared`, or without groups.

    A shared prefix has at most `limits` tokens, by sequence.
    """
    if groups is None or not model.family.follows_position_ids:
        return None  # columns of padding would lie between a shared prefix and what follows it
    lengths = common_lengths(sequences, limits, groups)
    prefixes = {
        tuple(ids[:length]): None for ids, length in zip(sequences, lengths, strict=True) if length
    }
    least = LEAST_TOKENS if least_shared is None else least_shared
    if not prefixes or sum(lengths) - sum(map(len, prefixes)) < least:
        return None
    from transformers import DynamicCache

    batch, cache = pad(list(prefixes), device=model.device, side="left"), DynamicCache()
    sparse = sparse_modules(model, range(model.num_layers), batch.mask_BT.cpu().bool())
    # The pass stops at the last MLP, when all keys and values are known.
    stop = capture(model, inputs=[model.family.mlp(model.num_layers - 1)])
    with torch.no_grad(), stop, at_tokens(sparse):
        model.module(model.family.base)(**batch.arguments, past_key_values=cache, use_cache=True)
    places = {ids: place for place, ids in enumerate(prefixes)}
    own_B = torch.tensor(
        [
            places.get(tuple(ids[:length]), 0)
            for ids, length in zip(sequences, lengths, strict=True)
        ],
        device=model.device,
    )
    has_any_B1 = torch.tensor(lengths, device=model.device)[:, None] > 0
    layers: Any = cache.layers
    return SharedPrefixes(
        lengths=tuple(lengths),
        mask_BP=batch.mask_BT[own_B] * has_any_B1,
        own_B=own_B,
        layers=tuple((layer.keys, layer.values) for layer in layers),
    )


def common_lengths(
    sequences: Sequence[Sequence[int]], limits: Sequence[int], groups: Sequence[Hashable]
) -> list[int]:
    """By sequence, the length of the common prefix of its group, at most the smallest limit in the
    group.
    """
    members: dict[Hashable, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    lengths = [0] * len(sequences)
    for places in members.values():
        if len(places) > 1:
            longest = min(limits[place] for place in places)
            columns = zip(*(sequences[place][:longest] for place in places), strict=True)
            same = next(
                (index for index, column in enumerate(columns) if len(set(column)) > 1), longest
            )
            for place in places:
                lengths[place] = same
    return lengths
