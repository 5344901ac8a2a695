"""Running a network again and again from one block and one token on, without the work that cannot
change.

A target search changes the output of block l at the subject's last token. Whatever lies below that
block, and the keys and values of every earlier token, stay as they are: they are computed once.
Each step then runs only the remaining tokens through the remaining blocks, and of the last block's
MLP only the tokens that are read.

Shape letters: B sequences, T all tokens, P those before the start, S those from it on (T = P + S),
D residual width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.shared_prefixes import Shared, share
from editkit.model.sparse import at_tokens, sparse_modules

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

KINDS = {
    "full_attention",
    "sliding_attention",
}  # of layers whose cache is keys and values, in transformers' `layer_types`


@dataclass(frozen=True, kw_only=True, eq=False)
class Continuation:
    """Sequences aligned at their starts (left padding before, right padding behind), run once and
    ready to be gone on with.
    """

    model: EditableModel
    layer: int
    hidden_BSD: torch.Tensor  # the output of block `layer` from the start on
    at_start: dict[
        str, torch.Tensor
    ]  # what else was asked for: outputs of modules at the start, (B, width)
    # Keys and values (B, H, P, E) of every layer; of those up to `layer` lengths alone.
    prefix: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    mask_BT: torch.Tensor
    positions_BS: torch.Tensor
    is_token_BS: (
        torch.Tensor
    )  # on the CPU, as the next: what follows from them is known without waiting for a GPU
    is_read_BS: torch.Tensor  # where the final hidden states are wanted

    def run(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """What the network makes of these outputs of block `layer`: hidden states after the final
        norm, (B, S, D). Gradients flow.

        Right at the tokens that are read only.
        """
        with (
            at_tokens(self.sparse),
            only_blocks(self.model, range(self.layer + 1, self.model.num_layers)) as base,
        ):
            result: torch.Tensor = base(
                inputs_embeds=hidden_BSD,
                attention_mask=self.mask_BT,
                position_ids=self.positions_BS,
                past_key_values=_cache(self.prefix),
                use_cache=True,
            ).last_hidden_state.to(self.model.device)
            return result

    @cached_property
    def sparse(self) -> dict[Any, torch.Tensor]:
        """Modules that run at some tokens only, and at which."""
        last = self.model.num_layers - 1
        above = range(self.layer + 1, last + 1)
        return sparse_modules(
            self.model, above, self.is_token_BS, read_layer=last, is_read_BT=self.is_read_BS
        )

    def only(self, rows: Sequence[int]) -> Continuation:
        """Of some of the sequences."""
        on_cpu = torch.tensor(rows)
        rows_R = on_cpu.to(self.mask_BT.device)
        return replace(
            self,
            hidden_BSD=self.hidden_BSD[rows_R],
            at_start={name: output_BX[rows_R] for name, output_BX in self.at_start.items()},
            prefix=tuple(
                (keys[rows_R.to(keys.device)], values[rows_R.to(keys.device)])
                for keys, values in self.prefix
            ),
            mask_BT=self.mask_BT[rows_R],
            positions_BS=self.positions_BS[rows_R],
            is_token_BS=self.is_token_BS[on_cpu],
            is_read_BS=self.is_read_BS[on_cpu],
        )


def prepare(
    model: EditableModel,
    layer: int,
    sequences: Sequence[Sequence[int]],
    starts: Sequence[int],
    *,
    reads: Sequence[Sequence[int]] | None = None,
    at_start: Sequence[str] = (),
    groups: Sequence[Hashable] | None = None,
) -> Continuation:
    """Runs token sequences once; `starts` are the positions from which they will be gone on with,
    the subject's last token of each.

    Args:
        reads: by sequence, the positions whose final hidden states are wanted; all from the start
        on, if not given. What lies behind the
            last of them is left out: it can reach none of them.
        at_start: modules up to block `layer` whose outputs at the starts are wanted. groups: by
        sequence, a name that those have in common which may begin alike: that is run once for all
        of them.
    """
    if reads is None:
        reads = [range(start, len(ids)) for ids, start in zip(sequences, starts, strict=True)]
    ends = [
        max(start, *positions) + 1 if positions else start + 1
        for start, positions in zip(starts, reads, strict=True)
    ]
    shared = share(model, sequences, starts, groups)
    skipped = [0] * len(starts) if shared is None else shared.lengths
    # At least one column before and two behind: with fewer, transformers asks whether the mask is
    # all ones, which waits for a GPU.
    num_before = max(1, *(start - skip for start, skip in zip(starts, skipped, strict=True)))
    num_after = max(2, *(end - start for start, end in zip(starts, ends, strict=True)))
    ids_BT = torch.zeros(len(sequences), num_before + num_after, dtype=torch.long)
    mask_BT, is_read_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, (ids, start, skip, end, positions) in enumerate(
        zip(sequences, starts, skipped, ends, reads, strict=True)
    ):
        offset = num_before - start  # from a position to its column
        ids_BT[row, offset + skip : offset + end] = torch.tensor(ids[skip:end])
        mask_BT[row, offset + skip : offset + end] = 1
        is_read_BT[row, [offset + position for position in positions]] = True
    positions_BT = ((mask_BT.cumsum(-1) - 1).clamp(min=0) + torch.tensor(skipped)[:, None]).to(
        model.device
    )
    is_token_BT, mask_BT = mask_BT.bool(), mask_BT.to(model.device)
    seen_BT = mask_BT if shared is None else torch.cat([shared.mask_BP, mask_BT], dim=1)
    block, below = model.family.block(layer), range(layer + 1)
    wanted, sparse = (
        capture(model, outputs=[*dict.fromkeys((block, *at_start))]),
        sparse_modules(model, below, is_token_BT),
    )
    with torch.no_grad(), at_tokens(sparse), wanted as captured:
        model.module(model.family.base)(
            input_ids=ids_BT.to(model.device),
            attention_mask=seen_BT,
            position_ids=positions_BT,
            **_after(shared, below),
        )
    hidden_BTD = captured.outputs[block]
    before = slice(None, num_before)
    return Continuation(
        model=model,
        layer=layer,
        hidden_BSD=hidden_BTD[:, num_before:],
        at_start={name: captured.outputs[name][:, num_before] for name in at_start},
        prefix=_prefix(
            model,
            layer,
            shared,
            hidden_BTD[:, before],
            seen_BT[:, :-num_after],
            is_token_BT[:, before],
            positions_BT[:, before],
        ),
        mask_BT=seen_BT,
        positions_BS=positions_BT[:, num_before:],
        is_token_BS=is_token_BT[:, num_before:],
        is_read_BS=is_read_BT[:, num_before:],
    )


def can_continue(model: EditableModel, num_tokens: int) -> bool:
    """Whether cached keys and values mean the same as running everything.

    Not where a sliding window is shorter than the sequences, nor where layers keep something else
    than keys and values.
    """
    config = model.network.config
    if not set(getattr(config, "layer_types", None) or ()) <= KINDS:
        return False
    window: int | None = getattr(config, "sliding_window", None)
    return window is None or num_tokens <= window or not getattr(config, "use_sliding_window", True)


@contextmanager
def only_blocks(model: EditableModel, layers: range) -> Iterator[Any]:
    """Inside, the base network consists of these blocks and the final norm; what is given as
    embeddings is the first one's input.
    """
    base, config = model.module(model.family.base), model.network.config
    name = model.family.blocks.rpartition(".")[2]
    blocks, kinds = getattr(base, name), getattr(config, "layer_types", None)
    setattr(base, name, blocks[layers.start : layers.stop])
    if kinds is not None:
        config.layer_types = kinds[
            layers.start : layers.stop
        ]  # some networks look a block's mask up by its place in the list
    positions = getattr(base, "wpe", None)
    former = (
        vars(positions).get("forward") if positions is not None else None
    )  # accelerate, too, sets it on the instance
    if positions is not None:
        positions.forward = lambda _: torch.zeros(())  # GPT-2 adds them to what it is given
    try:
        yield base
    finally:
        setattr(base, name, blocks)
        if kinds is not None:
            config.layer_types = kinds
        if positions is not None and former is None:
            del positions.forward
        elif positions is not None:
            positions.forward = former


def _prefix(
    model: EditableModel,
    layer: int,
    shared: Shared | None,
    hidden_BPD: torch.Tensor,
    seen_BP: torch.Tensor,
    is_token_BP: torch.Tensor,
    positions_BP: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Keys and values of the tokens before the start, from the outputs of block `layer`. The last
    block ends at its attention.
    """
    above = range(layer + 1, model.num_layers)
    cache = _after(shared, above).get("past_key_values", _cache(()))
    if above:
        stop = capture(model, inputs=[model.family.mlp(above[-1])])
        with (
            torch.no_grad(),
            stop,
            at_tokens(sparse_modules(model, above, is_token_BP)),
            only_blocks(model, above) as base,
        ):
            base(
                inputs_embeds=hidden_BPD,
                attention_mask=seen_BP,
                position_ids=positions_BP,
                past_key_values=cache,
                use_cache=True,
            )
    lengths = _lengths(len(hidden_BPD), seen_BP.shape[1], hidden_BPD)
    return tuple(
        (cache.layers[each].keys, cache.layers[each].values) if each in above else lengths
        for each in range(model.num_layers)
    )


def _after(shared: Shared | None, layers: range) -> dict[str, Any]:
    """The arguments that let these blocks go on behind what is shared."""
    if shared is None:
        return {"use_cache": False}
    unused = _lengths(len(shared.own_B), shared.num_columns, shared.layers[0][0])
    return {
        "past_key_values": _cache(
            [
                shared.keys_and_values(each) if each in layers else unused
                for each in range(len(shared.layers))
            ]
        ),
        "use_cache": True,
    }


def _lengths(
    num_rows: int, num_columns: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stands for keys and values that nobody reads: a cache's length is asked of its first
    layer.
    """
    length = like.new_zeros(1).expand(num_rows, 1, num_columns, 1)
    return length, length


def _cache(prefix: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A cache that begins with these keys and values, which are not modified: `update` puts new
    ones behind them in new tensors.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in prefix:
        layer: Any = (
            DynamicLayer()
        )  # filled by hand: its own `update` would copy them in every step
        layer.keys, layer.values, layer.dtype, layer.device, layer.is_initialized = (
            keys,
            values,
            keys.dtype,
            keys.device,
            True,
        )
        cache.layers.append(layer)
    return cache
