"""Repeated forward passes from one block and one token on, with a cache of everything before them.

A target search changes the output of block l at the subject's last token. The blocks up to l and
the keys and values of every earlier token stay the same, so they are computed once. Each step then
runs only the suffix: the remaining tokens through the remaining blocks. The last block's MLP runs
only at the tokens whose hidden states are read.

Shape letters: B sequences, T all tokens, P tokens before the start, S tokens from the start on
(T = P + S), D residual width, H heads, E head width.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from editkit.lazy import torch
from editkit.model.architecture import sliding_window
from editkit.model.capture import capture, replaced_input
from editkit.model.grouped_attention import grouped_attention
from editkit.model.products import rounded_products, rounded_weights
from editkit.model.shared_prefixes import SharedPrefixes, share_prefixes
from editkit.model.sparse import at_tokens, sparse_modules

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

# Layers whose cache consists of keys and values, as transformers' `layer_types` names them.
KEY_VALUE_LAYERS = {"full_attention", "sliding_attention"}


@dataclass(frozen=True, kw_only=True, eq=False)
class CachedSuffix:
    """Sequences with a cached prefix, aligned at their starts: left padding before, right padding
    after.
    """

    model: EditableModel
    layer: int
    hidden_BSD: torch.Tensor  # the output of block `layer` from the start on
    # outputs of further requested modules at the start, (B, width)
    at_start: dict[str, torch.Tensor]
    # Keys and values (B, H, P, E) of every layer. Those of layers up to `layer` only have a length.
    prefix: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    mask_BT: torch.Tensor
    positions_BS: torch.Tensor
    # Both masks are on the CPU, so that reading them does not wait for a GPU.
    is_token_BS: torch.Tensor
    is_read_BS: torch.Tensor  # true where the final hidden states are read
    # the linear layers whose products are computed in bfloat16
    rounded: Mapping[Any, torch.Tensor] = field(default_factory=dict)

    def run(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm, (B, S, D), for these outputs of block `layer`.

        Only the values at the tokens that are read are correct. Gradients flow.
        """
        arguments = {
            "attention_mask": self.mask_BT,
            "position_ids": self.positions_BS,
            "past_key_values": _cache(self.prefix),
            "use_cache": True,
        }
        above = range(self.layer + 1, self.model.num_layers)
        products = rounded_products(self.rounded)
        with products, at_tokens(self.sparse), grouped_attention(self.model):
            output = run_blocks(self.model, above, hidden_BSD, arguments)
        result: torch.Tensor = output.last_hidden_state.to(self.model.device)
        return result

    @cached_property
    def sparse(self) -> dict[Any, torch.Tensor]:
        """Modules that run at a part of the tokens, with the indices of these tokens."""
        last = self.model.num_layers - 1
        above = range(self.layer + 1, last + 1)
        return sparse_modules(
            self.model, above, self.is_token_BS, read_layer=last, is_read_BT=self.is_read_BS
        )

    def with_rounded_products(self) -> CachedSuffix:
        """The same with the products of linear layers in bfloat16, if the network is float32."""
        above = range(self.layer + 1, self.model.num_layers)
        return replace(self, rounded=rounded_weights(self.model, above))

    def only(self, rows: Sequence[int]) -> CachedSuffix:
        """The same for some of the sequences."""
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
    through: int | None = None,
    groups: Sequence[Hashable] | None = None,
    least_shared: int | None = None,
) -> CachedSuffix:
    """Runs the prefixes of token sequences once.

    Args:
        starts: by sequence, the position at which the suffix begins (the subject's last token).
        reads: by sequence, the positions whose final hidden states are read; all from the start on
            if None. Tokens after the last of them are dropped, because they cannot influence it.
        at_start: modules whose outputs at the starts are needed as well.
        through: the block that contains the last of them; `layer` if None.
        groups: by sequence, the name of its group. Common beginnings within a group run once.
        least_shared: the fewest tokens that sharing must save; `LEAST_TOKENS` if None.
    """
    if reads is None:
        reads = [range(start, len(ids)) for ids, start in zip(sequences, starts, strict=True)]
    ends = [
        max(start, *positions) + 1 if positions else start + 1
        for start, positions in zip(starts, reads, strict=True)
    ]
    shared = share_prefixes(model, sequences, starts, groups, least_shared=least_shared)
    skipped = [0] * len(starts) if shared is None else shared.lengths
    # At least one column before the start and two from it on. With fewer, transformers tests
    # whether the mask is all ones, which waits for a GPU.
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
    full_mask_BT = mask_BT if shared is None else torch.cat([shared.mask_BP, mask_BT], dim=1)
    block, below = model.family.block(layer), range((layer if through is None else through) + 1)
    outputs, sparse = (
        capture(model, outputs=[*dict.fromkeys((block, *at_start))]),
        sparse_modules(model, below, is_token_BT),
    )
    with torch.no_grad(), at_tokens(sparse), outputs as captured:
        model.module(model.family.base)(
            input_ids=ids_BT.to(model.device),
            attention_mask=full_mask_BT,
            position_ids=positions_BT,
            **_cache_arguments(shared, below),
        )
    hidden_BTD = captured.outputs[block]
    before = slice(None, num_before)
    return CachedSuffix(
        model=model,
        layer=layer,
        hidden_BSD=hidden_BTD[:, num_before:],
        at_start={name: captured.outputs[name][:, num_before] for name in at_start},
        prefix=_prefix(
            model,
            layer,
            shared,
            hidden_BTD[:, before],
            full_mask_BT[:, :-num_after],
            is_token_BT[:, before],
            positions_BT[:, before],
        ),
        mask_BT=full_mask_BT,
        positions_BS=positions_BT[:, num_before:],
        is_token_BS=is_token_BT[:, num_before:],
        is_read_BS=is_read_BT[:, num_before:],
    )


def supports_caching(model: EditableModel, num_tokens: int) -> bool:
    """Whether a pass with cached keys and values equals a full pass for sequences of this length.

    It does not if a sliding window is shorter than the sequences, or if a layer caches anything
    other than keys and values.
    """
    config = model.network.config.get_text_config()
    if not set(getattr(config, "layer_types", None) or ()) <= KEY_VALUE_LAYERS:
        return False
    window = sliding_window(config)
    return window is None or num_tokens <= window


def run_blocks(
    model: EditableModel, layers: range, hidden_BSD: torch.Tensor, arguments: Mapping[str, Any]
) -> Any:
    """The output of the base network, reduced to these blocks and the final norm.

    `hidden_BSD` is the input of the first block, whatever the network makes of its embeddings.
    """
    base, config = model.module(model.family.base), model.network.config.get_text_config()
    name = model.family.blocks.rpartition(".")[2]
    blocks, kinds = getattr(base, name), getattr(config, "layer_types", None)
    after = model.family.final_norm  # of a search above the last block
    first = blocks[layers.start] if layers or after is None else model.module(after)
    setattr(base, name, blocks[layers.start : layers.stop])
    if kinds is not None:
        # Some networks look up a block's mask by its index in the list.
        config.layer_types = kinds[layers.start : layers.stop]
    try:
        with replaced_input(first, hidden_BSD):
            ids_BS = torch.zeros(hidden_BSD.shape[:2], dtype=torch.long, device=hidden_BSD.device)
            return base(input_ids=ids_BS, **arguments)
    finally:
        setattr(base, name, blocks)
        if kinds is not None:
            config.layer_types = kinds


def _prefix(
    model: EditableModel,
    layer: int,
    shared: SharedPrefixes | None,
    hidden_BPD: torch.Tensor,
    mask_BP: torch.Tensor,
    is_token_BP: torch.Tensor,
    positions_BP: torch.Tensor,
) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Keys and values of the tokens before the start, from the outputs of block `layer`.

    The pass stops after the last block's attention.
    """
    above = range(layer + 1, model.num_layers)
    cache = _cache_arguments(shared, above).get("past_key_values", _cache(()))
    if above:
        arguments = {
            "attention_mask": mask_BP,
            "position_ids": positions_BP,
            "past_key_values": cache,
            "use_cache": True,
        }
        stop = capture(model, inputs=[model.family.mlp(above[-1])])
        with torch.no_grad(), stop, at_tokens(sparse_modules(model, above, is_token_BP)):
            run_blocks(model, above, hidden_BPD, arguments)
    placeholder = _placeholder(len(hidden_BPD), mask_BP.shape[1], hidden_BPD)
    return tuple(
        (cache.layers[index].keys, cache.layers[index].values) if index in above else placeholder
        for index in range(model.num_layers)
    )


def _cache_arguments(shared: SharedPrefixes | None, layers: range) -> dict[str, Any]:
    """The arguments with which these blocks continue after the shared prefixes."""
    if shared is None:
        return {"use_cache": False}
    placeholder = _placeholder(len(shared.own_B), shared.num_columns, shared.layers[0][0])
    return {
        "past_key_values": _cache(
            [
                shared.keys_and_values(index) if index in layers else placeholder
                for index in range(len(shared.layers))
            ]
        ),
        "use_cache": True,
    }


def _placeholder(
    num_rows: int, num_columns: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes the place of keys and values that no block reads. It is needed because transformers
    takes a cache's length from its first layer.
    """
    length = like.new_zeros(1).expand(num_rows, 1, num_columns, 1)
    return length, length


def _cache(prefix: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """A cache that begins with these keys and values.

    They are not modified, because `update` appends new ones in new tensors.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache()
    for keys, values in prefix:
        # Filled directly, because the layer's own `update` would copy the tensors in every step.
        layer: Any = DynamicLayer()
        layer.keys, layer.values, layer.dtype, layer.device, layer.is_initialized = (
            keys,
            values,
            keys.dtype,
            keys.device,
            True,
        )
        cache.layers.append(layer)
    return cache
