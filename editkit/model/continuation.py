"""The final hidden states of growing texts: with cached keys and values, or from all tokens anew.

Shape letters: B rows, T tokens, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from editkit.lazy import torch
from editkit.model.beside import routing_of
from editkit.model.tokens import PADDING_ID, pad

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


class Continuation(Protocol):
    """Several texts to which tokens are appended."""

    def last_hidden(self) -> torch.Tensor:
        """(B, D): the final hidden state of each row's last token. Called once a step."""

    def append(self, token_B: torch.Tensor, done_B: torch.Tensor) -> None:
        """Appends a token to each row. The hidden states of rows that are done are not used."""


class CachedContinuation:
    """Rows with padding on the left. Each step runs only the newest tokens."""

    def __init__(self, model: EditableModel, rows: Sequence[Sequence[int]]) -> None:
        lengths = [len(row) for row in rows]
        batch = pad(rows, device=model.device, side="left", prompts=lengths)
        self._routing = routing_of(batch)
        self._model, self._mask_BT, self._cache = model, batch.mask_BT, None
        self._arguments: dict[str, Any] = batch.arguments
        self._length_B = batch.mask_BT.sum(-1)

    def last_hidden(self) -> torch.Tensor:
        base = self._model.module(self._model.family.base)
        with self._model.routed(self._routing):
            output = base(**self._arguments, past_key_values=self._cache, use_cache=True)
        self._routing = self._routing and self._routing.after()
        self._cache = output.past_key_values
        last_BD: torch.Tensor = output.last_hidden_state[:, -1]
        return last_BD

    def append(self, token_B: torch.Tensor, done_B: torch.Tensor) -> None:
        last = self._model.max_length - 1
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(self._mask_BT[:, :1])], dim=-1)
        self._arguments = {
            "input_ids": token_B.masked_fill(done_B, PADDING_ID)[:, None],
            "attention_mask": self._mask_BT,
            "position_ids": self._length_B.clamp(max=last)[:, None],
        }
        self._length_B = self._length_B + 1


class PlainContinuation:
    """Rows with padding on the right, all of whose tokens run in every step."""

    def __init__(self, model: EditableModel, rows: Sequence[Sequence[int]]) -> None:
        self._model, self._rows = model, [list(row) for row in rows]
        self._prompts = [len(row) for row in rows]

    def last_hidden(self) -> torch.Tensor:
        batch = pad(self._rows, device=self._model.device, prompts=self._prompts)
        hidden_BTD = self._model.final_hidden(batch)
        last_B = torch.tensor([len(row) - 1 for row in self._rows], device=hidden_BTD.device)
        return hidden_BTD[torch.arange(len(self._rows), device=hidden_BTD.device), last_B]

    def append(self, token_B: torch.Tensor, done_B: torch.Tensor) -> None:
        for row, token, done in zip(self._rows, token_B.tolist(), done_B.tolist(), strict=True):
            if not done:
                row.append(token)


def continuation(model: EditableModel, rows: Sequence[Sequence[int]]) -> Continuation:
    """The cached one if it is right for this network."""
    kind = CachedContinuation if model.shortcuts.allows("generation") else PlainContinuation
    return kind(model, rows)
