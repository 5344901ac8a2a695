"""A stand-in beside the weights: another language model that answers some prompts.

A stand-in chooses once for each prompt, from the prompt's tokens: what it reads before them, and
its share in the answer. It then reads `before + prompt + answer so far`, text by text, and its
logits take the place of the network's. With a share below 1 the two distributions are mixed. The
network runs unchanged, so that every other prompt keeps its numbers bit for bit.

Where final hidden states become logits is far from where prompts are known. So the hidden states of
a pass in which the stand-in answers are wider: those of the network, those of the stand-in (zeros
where it does not answer), and its share. A hook at the head takes them apart. It needs a head whose
product alone are the logits (`EditableModel.head_is_matrix`).

The stand-in has no cache of its own: a pass that continues a text reads the whole text anew, so
that cached and uncached texts are the same. Of a text longer than its context length it reads
`before` and the last tokens.

Shape letters: B rows, T tokens, D and E width of the network and of the stand-in, V vocabulary, N
any leading shape.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from editkit.lazy import torch
from editkit.model.architecture import context_length
from editkit.model.side_value import AbstractBeside
from editkit.model.tokens import pad

Ids = tuple[int, ...]
ROWS = 32  # texts that a stand-in reads at once


class Answered(NamedTuple):
    """How a stand-in answers one prompt."""

    before: Ids  # what it reads before the prompt
    share: float  # of its distribution in the answer, above 0, at most 1


class AbstractStandIn(AbstractBeside):
    """Another causal language model of transformers, with the network's tokenizer."""

    network: Any

    @property
    def place(self) -> str:
        return "the head"

    @abc.abstractmethod
    def answers(self, prompts: Sequence[Ids], tokenizer: Any) -> list[Answered | None]:
        """By prompt; None if it leaves the prompt alone."""

    @property
    def max_length(self) -> int:
        """Its context length."""
        return context_length(self.network.config.get_text_config())

    def read(self, texts: Sequence[tuple[Ids, Ids]]) -> list[torch.Tensor]:
        """By text, given as what stands before it and its own tokens: the final hidden states
        (T, E) at the text's own tokens, of which the first are missing if it is too long.
        """
        rows, owns = list[Ids](), list[int]()
        start_token = self.network.config.get_text_config().bos_token_id
        for before, ids in texts:
            kept = ids[-max(1, self.max_length - len(before)) :]
            repeats = len(kept) > 1 and kept[:1] == before[:1] == (start_token,)
            row = (*before, *kept[repeats:])[-self.max_length :]  # one start token is enough
            rows.append(row)
            owns.append(min(len(row), len(kept) - repeats))
        found: list[torch.Tensor] = []
        for start in range(0, len(rows), ROWS):
            some = rows[start : start + ROWS]
            batch = pad(some, device=self.network.device)
            hidden_BTE = self.network.base_model(
                **batch.arguments, use_cache=False
            ).last_hidden_state
            found += [
                hidden_TE[len(row) - own : len(row)]
                for hidden_TE, row, own in zip(
                    hidden_BTE, some, owns[start : start + ROWS], strict=True
                )
            ]
        return found


@dataclass(frozen=True, slots=True)
class Text:
    """A text that a stand-in answers, or leaves alone: the end of it is what a pass may go on."""

    answered: Answered | None
    ids: Ids
    row: int
    columns: tuple[int, ...]  # of its tokens in this pass

    def followed_by(self, ids: Sequence[int]) -> Text:
        """The text in a further pass, which has only the new tokens."""
        return replace(self, ids=(*self.ids, *ids), columns=tuple(range(len(ids))))


def paths(columns: Sequence[int], attends_TT: torch.Tensor | None) -> list[list[int]]:
    """The texts of one prompt in a row, as columns: one, or, if a mask says to which columns each
    column attends, one for each column to which no other one attends.
    """
    if attends_TT is None:
        return [list(columns)]
    own = torch.tensor(columns)
    attends_NN = attends_TT[own][:, own]
    is_last_N = attends_NN.sum(0) == 1  # attended to by itself alone
    return [own[attends_NN[last]].tolist() for last in torch.where(is_last_N)[0].tolist()]


def widened(
    stand_in: AbstractStandIn, hidden_BTD: torch.Tensor, texts: Sequence[Text]
) -> torch.Tensor:
    """(B, T, D + E + 1): the hidden states with those of the stand-in, and its share."""
    asked = [text for text in texts if text.answered is not None]
    if not asked:
        return hidden_BTD
    read = stand_in.read([(text.answered.before, text.ids) for text in asked if text.answered])
    width, other = hidden_BTD.shape[2], read[0].shape[1]
    wide = torch.nn.functional.pad(hidden_BTD, (0, other + 1))
    for text, hidden_TE in zip(asked, read, strict=True):
        columns = torch.tensor(text.columns[-len(hidden_TE) :], device=wide.device)
        own = hidden_TE[-len(columns) :].to(wide)
        wide[text.row, columns, width:-1] = own
        wide[text.row, columns, -1] = text.answered.share if text.answered else 0.0
    return wide


class Head:
    """The hooks at the network's head, which takes wide hidden states apart."""

    def __init__(self, head: Any, stand_in: AbstractStandIn) -> None:
        self.stand_in = stand_in
        self._width: int = head.weight.shape[1]
        self._rest: torch.Tensor | None = None  # of the product that is computed
        self.handles = [
            head.register_forward_pre_hook(self._before),
            head.register_forward_hook(self._after),
        ]

    def _before(self, _head: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0]
        if hidden.shape[-1] == self._width:
            self._rest = None
            return None
        self._rest = hidden[..., self._width :]
        return (hidden[..., : self._width], *args[1:])

    def _after(self, _head: Any, _args: Any, logits: torch.Tensor) -> torch.Tensor | None:
        rest, self._rest = self._rest, None
        if rest is None or not bool((is_own := rest[..., -1] > 0).any()):
            return None
        own_NE, share_N = rest[is_own][:, :-1], rest[is_own][:, -1].float()
        head: Any = self.stand_in.network.get_output_embeddings()
        with torch.no_grad():
            own_NV = _of_width(head(own_NE).to(logits), logits.shape[-1])
            mixed = logits.clone()
            mixed[is_own] = _mixed(logits[is_own], own_NV, share_N).to(logits)
        return mixed


def _of_width(logits_NV: torch.Tensor, width: int) -> torch.Tensor:
    """Models of one tokenizer may have more or fewer rows behind its tokens."""
    lowest = torch.finfo(logits_NV.dtype).min
    missing = max(0, width - logits_NV.shape[1])
    return torch.nn.functional.pad(logits_NV[:, :width], (0, missing), value=lowest)


def _mixed(base_NV: torch.Tensor, own_NV: torch.Tensor, share_N: torch.Tensor) -> torch.Tensor:
    """The stand-in's logits where its share is 1, else log-probabilities of the mixture."""
    is_whole_N = share_N >= 1
    if bool(is_whole_N.all()):
        return own_NV
    share_N1 = share_N[:, None]
    base_NV, log_p_NV = (each.float().log_softmax(-1) for each in (base_NV, own_NV))
    mixture_NV = torch.logaddexp(base_NV + (-share_N1).log1p(), log_p_NV + share_N1.log())
    return torch.where(is_whole_N[:, None], own_NV.float(), mixture_NV)
