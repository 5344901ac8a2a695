"""Texts beside the weights: a memory that changes what the model reads in place of a prompt.

A prompt's tokens become a text again, the memory puts its own texts before it, and the whole is
tokenised. The answer's tokens stay as they are. So the model reads what a user would have typed.

Two ways lead here. Scoring and generation ask for the tokens of their prompts (`Reader.prompted`)
before they build trees and batches, and state where the prompts end. A pass that states nothing (a
call of the transformers model) is changed by hooks: a row without cached tokens is a prompt up to
its last token. Its outputs stand at the columns of the tokens that were given, counted from the
last one.

Shape letters: B rows, T tokens of a call, W tokens that are read instead, D width, V vocabulary, K
answers.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from editkit.lazy import torch
from editkit.model.architecture import context_length
from editkit.model.chat import ChatTemplate
from editkit.model.side_value import AbstractBeside
from editkit.model.tokens import PromptBatch, encode, encode_with_targets, pad
from editkit.types import Probe

Ids = tuple[int, ...]
# `Reader.choose`: texts, answers, and the chat template around the texts
Choose = Callable[[Sequence[str], Sequence[str], ChatTemplate | None], list[int]]
ROWS = 16  # of texts about which the model is asked at once


class AbstractTexts(AbstractBeside):
    """A memory of texts."""

    chat: ChatTemplate | None  # around each prompt; the texts come inside it

    @property
    def place(self) -> str:
        return "the prompt"

    @abc.abstractmethod
    def read_as(self, prompts: Sequence[str], choose: Choose) -> list[str | None]:
        """By prompt, the text that the model reads in its place; None: the prompt is left alone.

        Args:
            choose: asks the model that reads it which of some answers it would give.
        """


class Reader:
    """What a network reads in place of prompts."""

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        texts: Sequence[AbstractTexts],
        stated: Callable[[torch.Tensor | None], AbstractContextManager[None]],
    ) -> None:
        """
        Args:
            stated: inside, passes take the ends of their prompts as given, (B, T).
        """
        self.network, self.tokenizer, self.texts = network, tokenizer, tuple(texts)
        self._stated = stated
        self._held: _Held | None = None  # of the texts that passes with cached tokens continue
        self._columns_BT: torch.Tensor | None = None  # of the pass that runs

    def prompted(
        self, prompts: Sequence[Sequence[int]], *, longest: int | None = None
    ) -> list[Ids]:
        """The tokens that are read for each prompt. Prompts that are left alone keep theirs.

        Args:
            longest: others lose their beginning beyond this many tokens; None: none does.
        """
        found = [tuple(prompt) for prompt in prompts]
        for memory in self.texts:
            distinct = list(dict.fromkeys(found))
            asked = [self._text(ids, memory.chat) for ids in distinct]
            read = memory.read_as(asked, self.choose)
            new = [text for text in read if text is not None]
            encoded = iter(encode(self.tokenizer, new, chat=memory.chat))
            tokens = {
                ids: ids if text is None else next(encoded).ids[-(longest or 0) :]
                for ids, text in zip(distinct, read, strict=True)
            }
            found = [tokens[ids] for ids in found]
        return found

    def choose(
        self, texts: Sequence[str], answers: Sequence[str], chat: ChatTemplate | None
    ) -> list[int]:
        """By text, the index of the answer whose first token is most probable after it. No memory
        changes the texts. A text that exceeds the context length loses its beginning.
        """
        probes = [Probe(prompt=text, answer=answer) for text in texts for answer in answers]
        asked = encode_with_targets(self.tokenizer, probes, chat=chat)
        rows = [each.ids[: each.start][-self._positions :] for each in asked[:: len(answers)]]
        firsts_BK = torch.tensor([each.target_ids[0] for each in asked]).view(-1, len(answers))
        chosen: list[int] = []
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            device = next(self.network.parameters()).device
            batch = pad(some, device=device, side="left", prompts=[len(ids) for ids in some])
            with torch.no_grad(), self._stated(batch.ends_BT):
                logits_BV = self.network(**batch.arguments, use_cache=False).logits[:, -1]
            own_BK = firsts_BK[start : start + ROWS].to(device)
            chosen += logits_BV.gather(1, own_BK).argmax(dim=1).tolist()
        return chosen

    @property
    def _positions(self) -> int:
        return context_length(self.network.config.get_text_config())

    def _text(self, ids: Ids, chat: ChatTemplate | None) -> str:
        if chat is not None:
            whole = self._decoded(ids, keep=True)
            if whole.startswith(chat.before) and whole.endswith(chat.after):
                return whole[len(chat.before) : len(whole) - len(chat.after)]
        return self._decoded(ids, keep=False)

    def _decoded(self, ids: Ids, *, keep: bool) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=not keep, clean_up_tokenization_spaces=False
            )
        )

    # Passes that state nothing

    def hooks(self, base: torch.nn.Module, *, is_stated: Callable[[], bool]) -> list[Any]:
        """Hooks on the network without its head, for passes that do not state their prompts."""

        def before(
            _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            self._columns_BT = None
            return None if is_stated() else self._changed(args, kwargs)

        return [
            base.register_forward_pre_hook(before, with_kwargs=True),
            base.register_forward_hook(self._returned),
        ]

    def _changed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        ids_BT = args[0] if args else kwargs.get("input_ids")
        if ids_BT is None:
            return None
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            if self._held is None:
                return None
            self._held = self._held.longer_by(ids_BT.shape[1])
            arguments = self._held.arguments(ids_BT)
        else:
            mask_BT = kwargs.get("attention_mask")
            if mask_BT is None or mask_BT.dim() != 2:
                mask_BT = torch.ones_like(ids_BT)
            rows = [
                tuple(ids_T[mask_T > 0].tolist())
                for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)
            ]
            new = self.prompted(rows, longest=self._positions)
            if new == rows:
                self._held = None
                return None
            batch = pad(new, device=ids_BT.device, side="left")
            self._columns_BT = _columns(mask_BT, batch)
            self._held = _Held(batch.mask_BT)
            arguments = batch.arguments
        dropped = {"cache_position", "token_type_ids", *arguments}
        kept = {name: value for name, value in kwargs.items() if name not in dropped}
        return (), arguments | kept

    def _returned(self, _module: Any, _args: Any, output: Any) -> Any:
        columns_BT, self._columns_BT = self._columns_BT, None
        if columns_BT is None:
            return None
        hidden_BWD = output[0]
        rows_B1 = torch.arange(len(hidden_BWD), device=hidden_BWD.device)[:, None]
        output["last_hidden_state"] = hidden_BWD[rows_B1, columns_BT]
        return output


@dataclass(frozen=True, eq=False)
class _Held:
    """The rows that further passes continue."""

    mask_BW: torch.Tensor

    def longer_by(self, count: int) -> _Held:
        ones = torch.ones_like(self.mask_BW[:, :1]).expand(-1, count)
        return _Held(torch.cat([self.mask_BW, ones], dim=1))

    def arguments(self, ids_BT: torch.Tensor) -> dict[str, torch.Tensor]:
        positions_BW = self.mask_BW.cumsum(-1) - 1
        return {
            "input_ids": ids_BT,
            "attention_mask": self.mask_BW,
            "position_ids": positions_BW[:, -ids_BT.shape[1] :],
        }


def _columns(mask_BT: torch.Tensor, batch: PromptBatch) -> torch.Tensor:
    """(B, T): the column of the batch that stands for each given token, counted from the last."""
    numbers_BT = mask_BT.cumsum(-1)
    before_last_BT = numbers_BT[:, -1:] - numbers_BT
    width = batch.ids_BT.shape[1]
    return (width - 1 - before_last_BT).clamp(min=0).to(batch.ids_BT.device)
