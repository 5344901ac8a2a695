"""Forward passes over the same texts while the blocks of a network are edited from the lowest up.

A method that edits several layers reads the keys of each layer after the layers below it were
edited. The input of the lowest edited layer never changes. Hidden states are therefore kept at the
last layer that was read, and the next pass starts there: each block runs once with its old weights
and once with its new weights, however many layers are edited.

Shape letters: M texts, T tokens (padded), D width of the residual stream, I inner width of the MLP,
O width of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.cached_suffix import run_blocks
from editkit.model.capture import Captured, capture
from editkit.model.sparse import at_tokens, sparse_modules
from editkit.model.tokens import PromptBatch, pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

KEPT_BYTES = 1 << 30  # limit of kept hidden states; further texts start from their tokens each time


@dataclass(slots=True, eq=False)
class Part:
    """Some of the texts as one batch."""

    batch: PromptBatch
    is_token_MT: torch.Tensor  # both masks are on the CPU
    is_end_MT: torch.Tensor
    hidden_MTD: torch.Tensor | None = None  # kept input of the block that was read last

    def every(self, step: int) -> Part:
        """Every `step`-th text."""
        batch, hidden_MTD = self.batch, self.hidden_MTD
        tensors = (batch.ids_BT, batch.mask_BT, batch.position_ids_BT, batch.first_B)
        some = PromptBatch(*(tensor[::step] for tensor in tensors))
        return Part(
            some,
            self.is_token_MT[::step],
            self.is_end_MT[::step],
            None if hidden_MTD is None else hidden_MTD[::step],
        )


class LayerwiseForward:
    """Texts as token ids, whose keys and outputs are read at their last tokens.

    Every result belongs to the current weights. Kept hidden states are discarded if a weight that
    produced them has changed.
    """

    def __init__(
        self, model: EditableModel, texts: Sequence[Sequence[int]], *, rows_at_once: int
    ) -> None:
        """Runs no pass yet. `rows_at_once` bounds the memory of a pass."""
        self._model = model
        self._parts = [
            _part(texts[start : start + rows_at_once], model.device)
            for start in range(0, len(texts), rows_at_once)
        ]
        self._layer = 0  # the layer at whose block hidden states are kept
        self._made_by: tuple[int, ...] = ()  # versions of the weights that produced them

    def keys(self, layer: int) -> torch.Tensor:
        """(M, I): the inputs of a layer's down projection. Hidden states are kept at its block."""
        block, module = self._model.family.block(layer), self._model.family.down_projection(layer)
        keys_at_ends, kept, num_bytes = [], [], 0
        for part in self._parts:
            captured = self._run(part, layer, inputs=[block, module])
            keys, hidden_MTD = captured.inputs[module], captured.inputs[block]
            is_sparse = keys.shape[:2] != part.is_end_MT.shape
            keys_at_ends.append(keys[0] if is_sparse else keys[part.is_end_MT.to(keys.device)])
            num_bytes += hidden_MTD.numel() * hidden_MTD.element_size()
            kept.append(hidden_MTD if num_bytes <= KEPT_BYTES else None)
        for part, hidden in zip(self._parts, kept, strict=True):
            part.hidden_MTD = hidden
        self._layer, self._made_by = layer, self._versions(layer)
        return torch.cat(keys_at_ends)

    def outputs(self, layer: int, module: str | None = None) -> torch.Tensor:
        """(M, O): the outputs of a block, or of a module in it."""
        name = self._model.family.block(layer) if module is None else module
        return torch.cat(
            [
                self._run(part, layer, outputs=[name]).outputs[name][
                    part.is_end_MT.to(self._model.device)
                ]
                for part in self._parts
            ]
        )

    def every(self, step: int) -> LayerwiseForward:
        """The passes over every `step`-th text, with the hidden states kept here.

        `rows_at_once` must be a multiple of `step`.
        """
        some = LayerwiseForward(self._model, (), rows_at_once=1)
        some._layer, some._made_by = self._layer, self._made_by
        some._parts = [part.every(step) for part in self._parts]
        return some

    def _run(
        self, part: Part, layer: int, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
    ) -> Captured:
        """One pass up to a block, whose MLP may run only at the last tokens, as (1, M, D)."""
        model, hidden_MTD = self._model, part.hidden_MTD
        is_short = model.shortcuts.allows("keys")
        is_kept = 0 < self._layer <= layer and self._made_by == self._versions(self._layer)
        if not (is_short and is_kept):
            hidden_MTD = None
        blocks = range(0 if hidden_MTD is None else self._layer, model.num_layers)
        sparse = {}
        if is_short:
            sparse = sparse_modules(
                model,
                range(blocks.start, layer + 1),
                part.is_token_MT,
                read_layer=layer,
                is_read_BT=part.is_end_MT,
            )
        batch = part.batch
        arguments = {
            "attention_mask": batch.mask_BT,
            "position_ids": batch.position_ids_BT,
            "use_cache": False,
        }
        with (
            torch.no_grad(),
            capture(model, inputs=inputs, outputs=outputs) as captured,
            at_tokens(sparse),
        ):
            if hidden_MTD is None:
                model.module(model.family.base)(input_ids=batch.ids_BT, **arguments)
            else:
                run_blocks(model, blocks, hidden_MTD, arguments)
        return captured

    def _versions(self, layer: int) -> tuple[int, ...]:
        """The number of writes to each weight below this block, as counted by torch."""
        blocks = [self._model.module(self._model.family.block(below)) for below in range(layer)]
        return tuple(parameter._version for block in blocks for parameter in block.parameters())


def _part(texts: Sequence[Sequence[int]], device: torch.device) -> Part:
    batch = pad(texts, device=device)
    is_token_MT = batch.mask_BT.cpu().bool()
    is_end_MT = torch.zeros_like(is_token_MT)
    is_end_MT[torch.arange(len(texts)), [len(text) - 1 for text in texts]] = True
    return Part(batch, is_token_MT, is_end_MT)
