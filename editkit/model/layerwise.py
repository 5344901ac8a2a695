"""Texts on their way up a network whose blocks are edited one after another, from below.

A method that writes several layers reads, for each of them, what goes into it after the layers
below were written. What enters the lowest of them is the same as before; so hidden states are kept
where the last reading left them, and each reading goes on from there: a block is run once with its
old weights and once with its new ones, however many lie below.

Shape letters: M texts, R some of them, T tokens (padded), D width of the residual stream, I inner
width of the MLP, O width of an output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.cached_suffix import only_blocks
from editkit.model.capture import Captured, capture
from editkit.model.sparse import at_tokens, sparse_modules
from editkit.model.tokens import PromptBatch, pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

KEPT_BYTES = 1 << 30  # of hidden states; texts beyond that run from their tokens each time


@dataclass(slots=True, eq=False)
class Part:
    """Some of the texts, as one batch."""

    batch: PromptBatch
    is_token_MT: torch.Tensor  # on the CPU, as the next
    is_end_MT: torch.Tensor
    hidden_MTD: torch.Tensor | None = None  # what enters the block at which the ascent stands

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


class Ascent:
    """Texts of token ids, read at their last tokens.

    What is read follows from the model's weights as they are at that moment. What is kept is thrown
    away where the weights that made it have changed.
    """

    def __init__(
        self, model: EditableModel, texts: Sequence[Sequence[int]], *, rows_at_once: int
    ) -> None:
        """Runs nothing. `rows_at_once` bounds the memory of a pass."""
        self._model = model
        self._parts = [
            _part(texts[start : start + rows_at_once], model.device)
            for start in range(0, len(texts), rows_at_once)
        ]
        self._layer = 0  # where it stands
        self._made_by: tuple[int, ...] = ()

    def keys(self, layer: int) -> torch.Tensor:
        """(M, I): what goes into the down projection of a layer. Hidden states are kept at its
        block from here on.
        """
        block, module = self._model.family.block(layer), self._model.family.down_projection(layer)
        found, kept, num_bytes = [], [], 0
        for part in self._parts:
            captured, is_sparse = self._run(part, layer, inputs=[block, module])
            keys, hidden_MTD = captured.inputs[module], captured.inputs[block]
            found.append(keys[0] if is_sparse else keys[part.is_end_MT.to(keys.device)])
            num_bytes += hidden_MTD.numel() * hidden_MTD.element_size()
            kept.append(hidden_MTD if num_bytes <= KEPT_BYTES else None)
        for part, hidden in zip(self._parts, kept, strict=True):
            part.hidden_MTD = hidden
        self._layer, self._made_by = layer, self._versions(layer)
        return torch.cat(found)

    def outputs(self, layer: int) -> torch.Tensor:
        """(M, O): what comes out of a block."""
        block = self._model.family.block(layer)
        return torch.cat(
            [
                self._run(part, layer, outputs=[block])[0].outputs[block][
                    part.is_end_MT.to(self._model.device)
                ]
                for part in self._parts
            ]
        )

    def every(self, step: int) -> Ascent:
        """Of every `step`-th text of each pass, `rows_at_once` being a multiple of that; it stands
        where this one does.
        """
        some = Ascent(self._model, (), rows_at_once=1)
        some._layer, some._made_by = self._layer, self._made_by
        some._parts = [part.every(step) for part in self._parts]
        return some

    def _run(
        self, part: Part, layer: int, *, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
    ) -> tuple[Captured, bool]:
        """One pass up to a block, of whose MLP only the last tokens are run; and whether the MLP
        was given those alone, as (1, M, D).
        """
        model, hidden_MTD = self._model, part.hidden_MTD
        if not 0 < self._layer <= layer or self._made_by != self._versions(self._layer):
            hidden_MTD = None
        blocks = range(0 if hidden_MTD is None else self._layer, model.num_layers)
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
                with only_blocks(model, blocks) as base:
                    base(inputs_embeds=hidden_MTD, **arguments)
        return captured, model.module(model.family.mlp(layer)) in sparse

    def _versions(self, layer: int) -> tuple[int, ...]:
        """Changes whenever a weight below this block is written: torch counts the writes."""
        blocks = [self._model.module(self._model.family.block(below)) for below in range(layer)]
        return tuple(parameter._version for block in blocks for parameter in block.parameters())


def _part(texts: Sequence[Sequence[int]], device: torch.device) -> Part:
    batch = pad(texts, device=device)
    is_token_MT = batch.mask_BT.cpu().bool()
    is_end_MT = torch.zeros_like(is_token_MT)
    is_end_MT[torch.arange(len(texts)), [len(text) - 1 for text in texts]] = True
    return Part(batch, is_token_MT, is_end_MT)
