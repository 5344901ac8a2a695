"""A memory of edits as texts, which stands before the prompts that ask for them.

    examples of the most similar edit, facts (the most similar one last), question

Everything is a text: a fact "The capital of X is Y" in the words of `fact`, a prompt in those of
`question`. The memory is looked up by the edits' prompts.

Shape letters: N entries, E width of an embedding (0 for BM25), C bytes of all texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from editkit.lazy import torch
from editkit.model.chat import ChatTemplate
from editkit.model.retrieval import Retriever
from editkit.model.texts import AbstractTexts, Choose
from editkit.model.tokens import PLACE
from editkit.types import TensorState

ANSWERS = ("yes", "no")  # of the model that is asked whether a fact concerns a prompt


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How the memory speaks. Each text has one "{}".

    Attributes:
        fact: around an edited fact, with what separates it from the next one.
        question: around a prompt.
        confirmation: around a prompt, after one fact in the words of `fact`: asks whether the fact
            concerns the prompt, for "yes" or "no". None: the model is not asked.
    """

    fact: str
    question: str
    confirmation: str | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One edit."""

    prompt: str  # by which it is found
    fact: str  # prompt and target as one text
    examples: str = ""  # what stands before the fact


@dataclass(frozen=True, eq=False, kw_only=True)
class TextMemory(AbstractTexts):
    """Some edits, the oldest first."""

    retriever: Retriever
    wording: Wording
    facts: int  # of the most similar edits, so many stand before a prompt
    threshold: float | None  # least similarity; None: any
    chat: ChatTemplate | None
    entries: tuple[Entry, ...]
    keys_NE: torch.Tensor

    def read_as(self, prompts: Sequence[str], choose: Choose) -> list[str | None]:
        """Empty prompts are left alone, and those that no entry is similar to."""
        chosen = [self.similar(prompt) if prompt.strip() else [] for prompt in prompts]
        if self.wording.confirmation is not None:
            chosen = self._confirmed(prompts, chosen, self.wording.confirmation, choose)
        return [
            self.before(entries) + put(self.wording.question, prompt) if entries else None
            for prompt, entries in zip(prompts, chosen, strict=True)
        ]

    def similar(self, prompt: str) -> list[Entry]:
        """The entries for a prompt, the most similar first."""
        texts = [entry.prompt for entry in self.entries]
        found = self.retriever.nearest(prompt, texts, self.keys_NE, self.facts)
        least = self.threshold
        return [self.entries[index] for index, share in found if least is None or share >= least]

    def before(self, entries: Sequence[Entry]) -> str:
        """What stands before the question. The most similar entry comes first in `entries`."""
        facts = [put(self.wording.fact, entry.fact) for entry in reversed(entries)]
        return entries[0].examples + "".join(facts)

    def _confirmed(
        self,
        prompts: Sequence[str],
        chosen: Sequence[Sequence[Entry]],
        confirmation: str,
        choose: Choose,
    ) -> list[list[Entry]]:
        """The entries that the model itself takes to concern the prompt."""
        pairs = [(number, entry) for number, entries in enumerate(chosen) for entry in entries]
        asked = [
            put(self.wording.fact, entry.fact) + put(confirmation, prompts[number])
            for number, entry in pairs
        ]
        answers = choose(asked, ANSWERS, self.chat)
        kept: list[list[Entry]] = [[] for _ in prompts]
        for (number, entry), answer in zip(pairs, answers, strict=True):
            if ANSWERS[answer] == "yes":
                kept[number].append(entry)
        return kept

    def with_entries(self, new: Sequence[Entry]) -> TextMemory:
        """The memory with further edits. A later edit of the same prompt takes the place of an
        earlier one.
        """
        latest = {entry.prompt: entry for entry in new}
        kept = [index for index, entry in enumerate(self.entries) if entry.prompt not in latest]
        keys = [self.keys_NE[kept], self.retriever.embed(list(latest)).to(self.keys_NE)]
        return replace(
            self,
            entries=(*(self.entries[index] for index in kept), *latest.values()),
            keys_NE=torch.cat(keys),
        )

    # As a value

    def options(self) -> dict[str, Any]:
        wording, chat = self.wording, self.chat
        return {
            "retriever": self.retriever.name,
            "fact": wording.fact,
            "question": wording.question,
            "confirmation": wording.confirmation,
            "facts": self.facts,
            "threshold": self.threshold,
            "chat": None if chat is None else [chat.before, chat.after, chat.gap],
        }

    def state(self) -> TensorState:
        columns = {
            "prompt": [entry.prompt for entry in self.entries],
            "fact": [entry.fact for entry in self.entries],
            "examples": [entry.examples for entry in self.entries],
        }
        tensors = {"keys": self.keys_NE}
        for name, texts in columns.items():
            tensors |= {f"{name}_{part}": value for part, value in packed(texts).items()}
        return tensors

    @classmethod
    def restored(cls, options: Mapping[str, Any], state: TensorState) -> Self:
        chat = options["chat"]
        return cls(
            retriever=Retriever(name=options["retriever"]),
            wording=Wording(
                fact=options["fact"],
                question=options["question"],
                confirmation=options["confirmation"],
            ),
            facts=options["facts"],
            threshold=options["threshold"],
            chat=None if chat is None else _template(*chat),
            entries=entries_of(state),
            keys_NE=state["keys"],
        )

    def figures(self) -> dict[str, float]:
        state = self.state()
        return {
            "entries": float(len(self.entries)),
            "parameters": float(self.keys_NE.numel()),
            "bytes": float(sum(tensor.nbytes for tensor in state.values())),
            "norm": float(self.keys_NE.double().norm()),
        }


def put(template: str, text: str) -> str:
    """The template with the text in its place."""
    before, after = template.split(PLACE)
    return before + text + after


def entries_of(state: TensorState) -> tuple[Entry, ...]:
    """The entries of a memory's tensors."""
    columns = [
        unpacked(state[f"{name}_bytes"], state[f"{name}_ends"])
        for name in ("prompt", "fact", "examples")
    ]
    return tuple(
        Entry(prompt=prompt, fact=fact, examples=examples)
        for prompt, fact, examples in zip(*columns, strict=True)
    )


def packed(texts: Sequence[str]) -> dict[str, torch.Tensor]:
    """Texts as tensors: `bytes` (C,) uint8, and `ends` (N,) int64, where each text ends."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    lengths = torch.tensor([len(each) for each in encoded], dtype=torch.int64)
    return {
        "bytes": torch.tensor(list(b"".join(encoded)), dtype=torch.uint8),
        "ends": lengths.cumsum(0),
    }


def unpacked(bytes_C: torch.Tensor, ends_N: torch.Tensor) -> list[str]:
    """The inverse of `packed`."""
    whole, ends = bytes(bytes_C.tolist()), ends_N.tolist()
    starts = [0, *ends[:-1]]
    return [
        whole[start:end].decode("utf-8", "surrogatepass")
        for start, end in zip(starts, ends, strict=False)
    ]


def _template(before: str, after: str, gap: str) -> ChatTemplate:
    return ChatTemplate(name="exported", before=before, after=after, gap=gap, jinja="")
