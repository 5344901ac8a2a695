"""Attention of a few tokens to a cached prefix in models whose query heads share keys and values
(GQA), without a copy of the keys and values for each query head.

With a mask, transformers repeats keys and values until every query head has its own. For the few
tokens of a suffix the copies cost more than the attention. Here the query heads that share a
key-value head become further rows of the same head: the scores, and so the outputs, are the same.

Shape letters: B sequences, H query heads, K key-value heads, G = H / K, S query tokens, T all
tokens, E head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from editkit.lazy import torch

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

NAME = "editkit_grouped"


@contextlib.contextmanager
def grouped_attention(model: EditableModel) -> Iterator[None]:
    """Groups the query heads within the context. Changes nothing for a model whose query heads have
    their own keys and values, or with another attention than transformers' "sdpa".
    """
    config = model.network.config.get_text_config()
    last = model.module(model.family.block(model.num_layers - 1))
    # Networks with an attention of their own do not have this number.
    is_shared = any(getattr(part, "num_key_value_groups", 1) > 1 for part in last.modules())
    if config._attn_implementation != "sdpa" or not is_shared:
        yield
        return
    _register()
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def attend(
    module: torch.nn.Module,
    query_BHSE: torch.Tensor,
    key_BKTE: torch.Tensor,
    value_BKTE: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The output of attention, (B, S, H, E). The arguments are those of transformers' attention
    functions; what cannot be grouped goes to its "sdpa".
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    num_sequences, num_heads, num_tokens, width = query_BHSE.shape
    num_shared = key_BKTE.shape[1]
    mask = attention_mask
    if num_heads == num_shared or mask is None or mask.shape[1] != 1 or _has_more(options):
        return sdpa_attention_forward(
            module, query_BHSE, key_BKTE, value_BKTE, mask, dropout, scaling, **options
        )
    rows = num_heads // num_shared * num_tokens  # G * S
    output = torch.nn.functional.scaled_dot_product_attention(
        query_BHSE.reshape(num_sequences, num_shared, rows, width),
        key_BKTE,
        value_BKTE,
        attn_mask=mask.repeat(1, 1, num_heads // num_shared, 1),
        dropout_p=dropout,
        scale=scaling,
    )
    output_BHSE = output.reshape(num_sequences, num_heads, num_tokens, -1)
    return output_BHSE.transpose(1, 2).contiguous(), None


def _has_more(options: dict[str, Any]) -> bool:
    """Whether an option changes the scores."""
    return any(
        options.get(name) is not None for name in ("softcap", "position_bias", "s_aux", "cache")
    )


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
