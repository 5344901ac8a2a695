"""Running a network again and again from one block and one token on, without the work that cannot change.

A target search changes the output of block l at the subject's last token. Whatever lies below that block, and the keys and values of every
earlier token, stay as they are: they are computed once. Each step then runs only the remaining tokens through the remaining blocks.

Shape letters: B sequences, T all tokens, P those before the start, S those from it on (T = P + S), D residual width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editkit.lazy import torch
from editkit.model.capture import capture

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuation:
    """Sequences aligned at their starts (left padding before, right padding behind), run once and ready to be gone on with."""

    model: EditableModel
    layer: int
    hidden_BSD: torch.Tensor  # the output of block `layer` from the start on
    prefix: tuple[
        tuple[torch.Tensor, torch.Tensor], ...
    ]  # keys and values (B, H, P, E) of every layer; of those up to `layer` lengths alone
    mask_BT: torch.Tensor
    positions_BS: torch.Tensor

    def run(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """What the network makes of these outputs of block `layer`: hidden states after the final norm, (B, S, D). Gradients flow."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, (keys_BHPE, values_BHPE) in enumerate(self.prefix):
            cache.update(keys_BHPE, values_BHPE, index)
        with only_blocks_above(self.model, self.layer) as base:
            return base(
                inputs_embeds=undo_embedding(base, hidden_BSD, self.positions_BS),
                attention_mask=self.mask_BT,
                position_ids=self.positions_BS,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state


def prepare(model: EditableModel, layer: int, sequences: Sequence[Sequence[int]], starts: Sequence[int]) -> Continuation:
    """Runs token sequences once; `starts` are the positions from which they will be gone on with, the subject's last token of each."""
    from transformers import DynamicCache

    num_before = max(starts)
    num_after = max(len(ids) - start for ids, start in zip(sequences, starts, strict=True))
    ids_BT = torch.zeros(len(sequences), num_before + num_after, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        ids_BT[row, num_before - start : num_before - start + len(ids)] = torch.tensor(ids)
        mask_BT[row, num_before - start : num_before - start + len(ids)] = 1
    ids_BT, mask_BT = ids_BT.to(model.device), mask_BT.to(model.device)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    block, cache = model.family.block(layer), DynamicCache()
    layers: Any = cache.layers  # transformers' types allow caches without keys, which no decoder of the family table has
    base = model.network.get_submodule(model.family.base)
    with torch.no_grad(), capture(model, outputs=[block], stop_after_last=False) as captured:
        base(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, past_key_values=cache, use_cache=True)
    return Continuation(
        model=model,
        layer=layer,
        hidden_BSD=captured.outputs[block][:, num_before:],
        prefix=tuple(
            (states.keys[:, :, :num_before], states.values[:, :, :num_before])
            if index > layer
            else (states.keys[:, :1, :num_before, :1], states.values[:, :1, :num_before, :1])
            for index, states in enumerate(layers)
        ),
        mask_BT=mask_BT,
        positions_BS=positions_BT[:, num_before:],
    )


def can_continue(model: EditableModel, num_tokens: int) -> bool:
    """Whether cached keys and values mean the same as running everything: not where a sliding window is shorter than the sequences."""
    config = model.network.config
    window: int | None = getattr(config, "sliding_window", None)
    return window is None or num_tokens <= window or not getattr(config, "use_sliding_window", True)


@contextmanager
def only_blocks_above(model: EditableModel, layer: int) -> Iterator[Any]:
    """Inside, the base network consists of the blocks above `layer` and the final norm."""
    base = model.network.get_submodule(model.family.base)
    name = model.family.blocks.rpartition(".")[2]
    blocks = getattr(base, name)
    setattr(base, name, blocks[layer + 1 :])
    try:
        yield base
    finally:
        setattr(base, name, blocks)


def undo_embedding(base: Any, hidden_BSD: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
    """What to hand in as embeddings so that the first block sees `hidden_BSD`: GPT-2 adds positions to them."""
    if hasattr(base, "wpe"):
        return hidden_BSD - base.wpe(positions_BS)
    return hidden_BSD
