"""Second moments of the keys of several matrices, in one pass over the texts.

Products are taken in float32 (float64 for a float64 network) and summed in float64: the published code sums 1e7 and more outer products in
float32. The matrix is the C of Meng et al. 2022 (arXiv 2202.05262), Eq. 2. Every token counts, a tokenizer's own BOS included, as its
key takes part in editing prompts too; padding does not.

Shape letters: B sequences, T tokens of the longest, M tokens that are no padding, I d_in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.linalg.spectral import gram
from editkit.model.capture import capture
from editkit.model.tokens import pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

GROUP = 1024  # documents that are sorted by length together: long enough to waste little padding, short enough to show progress


@dataclass(frozen=True, eq=False)
class MomentSum:
    """sum over tokens of k k^T, (I, I) float64, and over how many tokens."""

    sum_II: torch.Tensor
    num_tokens: int


def collect(
    model: EditableModel,
    modules: Sequence[str],
    texts: Sequence[str],
    *,
    context_length: int,
    batch_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, MomentSum]:
    """Sums of k k^T at the inputs of `modules`, all from the same forward passes, which stop above the last of them.

    A text counts with its first `context_length` tokens. `batch_tokens` bounds a pass, padding included; it changes no result beyond
    rounding. `progress` is told how many documents are done. Raises ConfigError where the texts hold no token.
    """
    sums: dict[str, torch.Tensor] = {}
    num_tokens = num_documents = 0
    with torch.no_grad():
        for batch in _batches(model, texts, context_length=context_length, batch_tokens=batch_tokens):
            prompts = pad(batch, device=model.device)
            is_token_BT = prompts.mask_BT.bool()
            with capture(model, inputs=modules) as captured:
                model.final_hidden(prompts)
            for module in modules:
                keys_MI = captured.inputs[module][is_token_BT]
                keys_MI = keys_MI.to(torch.promote_types(keys_MI.dtype, torch.float32))
                product_II = gram(keys_MI.mT).double()
                sums[module] = sums[module].add_(product_II) if module in sums else product_II
            num_tokens += int(is_token_BT.sum())
            num_documents += len(batch)
            if progress is not None:
                progress(num_documents)
    if not num_tokens:
        raise ConfigError("stats: the texts hold no token - raise stats.num_documents or choose another source.")
    return {module: MomentSum(sum_II, num_tokens) for module, sum_II in sums.items()}


def _batches(model: EditableModel, texts: Sequence[str], *, context_length: int, batch_tokens: int) -> Iterator[list[list[int]]]:
    """Token ids in batches of similar length, each at most `batch_tokens` wide times high (or one text)."""
    for start in range(0, len(texts), GROUP):
        encoded = model.tokenizer(list(texts[start : start + GROUP]), truncation=True, max_length=context_length)["input_ids"]
        batch: list[list[int]] = []
        for ids in sorted(filter(None, encoded), key=len):
            if batch and len(ids) * (len(batch) + 1) > batch_tokens:
                yield batch
                batch = []
            batch.append(ids)
        if batch:
            yield batch
