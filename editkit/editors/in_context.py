"""Edits in the context: nothing is trained, the edited facts stand before the prompt.

    ice    the bare fact (Zhang et al. 2024, arXiv 2401.01286, as a baseline)
    ike    demonstrations and the fact (Zheng et al. 2023, arXiv 2305.12740, section 3)
    rag    the most similar facts, where one is similar enough
    scr    the most similar facts that the model itself confirms, one by one (He et al. 2025, arXiv
           2503.05212, where it chooses among them)

They are one editor with other numbers. A demonstration is an edit of the dataset that the run does
not make, with a prompt and its answer:

    copy      the edit's own prompt     the new answer
    update    a paraphrase              the new answer
    retain    a prompt nearby           its old answer

Of eight demonstrations one copies, three update and four retain. The demonstrations of an edit are
the most similar facts, the most similar one last. Published code shuffles the kinds and draws the
paraphrases; here they follow from the rank. EasyEdit's present IKE leaves the new fact itself out
of the demonstrations and puts it into the prompt while it measures: the same text as here.

The papers measure one edit at a time, so that its fact always stands before the prompt. After
several edits the most similar ones do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from editkit.datasets.separators import joined
from editkit.editors.base import AbstractSideEditor, Plan, Step
from editkit.editors.ft import log_probabilities
from editkit.editors.text_memory import Entry, TextMemory, Wording, entries_of, put
from editkit.errors import OptionError, message
from editkit.lazy import torch
from editkit.model.retrieval import BM25, Retriever
from editkit.model.tokens import PLACE, encode
from editkit.resources.workload import REQUEST, EditorMemory, Workload
from editkit.types import EditRequest, Probe, TensorState

if TYPE_CHECKING:
    from editkit.datasets.base import LoadedDataset
    from editkit.model.editable import EditableModel
    from editkit.model.side_value import AbstractBeside
    from editkit.stats.store import Moments

# The kinds of demonstrations by rank, from the most similar one on (IKE, section 4.1: 1 : 3 : 4).
KINDS = ("retain", "update", "retain", "copy", "update", "retain", "update", "retain")
BETWEEN = "\n\n"  # after a demonstration
TEXT_BYTES = 150  # of an entry without demonstrations, and of a demonstration
ENCODER_BYTES = 4 * 23_000_000  # of all-MiniLM-L6-v2
EMBEDDING_BYTES = 4 * 384


@dataclass(frozen=True, kw_only=True)
class TextPlan(Plan):
    """The memory with the batch's entries."""

    memory: TextMemory


@dataclass(frozen=True, kw_only=True)
class InContext(AbstractSideEditor[TextPlan]):
    """A memory of texts. The options are documented in `conf/editor/ike.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    needs_subject: ClassVar[bool] = False

    name: str
    retriever: str
    facts: int
    threshold: float | None
    demonstrations: int
    pool: int
    fact: str
    question: str
    confirmation: str | None

    def __post_init__(self) -> None:
        problems = [
            message(name, "out of range", got=getattr(self, name), expected=f"at least {least}")
            for name, least in (("facts", 1), ("demonstrations", 0), ("pool", 1))
            if getattr(self, name) < least
        ]
        if self.threshold is not None and not math.isfinite(self.threshold):
            expected = "a number, or null for none"
            problems.append(
                message("threshold", "not finite", got=self.threshold, expected=expected)
            )
        problems += [
            message(name, "the text is malformed", got=text, expected=f"exactly one {PLACE}")
            for name in ("fact", "question", "confirmation")
            if (text := getattr(self, name)) is not None and text.count(PLACE) != 1
        ]
        if problems:
            raise OptionError(problems)

    def lacks(self) -> list[str]:
        return self._lookup.problems()

    def check_requests(self, data: LoadedDataset, requests: Sequence[EditRequest]) -> list[str]:
        problems = self.lacks()
        edited = {request.id for request in requests}
        others = sum(request.id not in edited for request in data.requests)
        if others < self.demonstrations:
            problem = "too few requests of the dataset are not edited"
            fix = "make fewer edits, or set editor.demonstrations lower"
            got, expected = f"{others} of {len(data.requests)}", f"at least {self.demonstrations}"
            problems.append(message("demonstrations", problem, got=got, expected=expected, fix=fix))
        return problems

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """None: it stands before the prompt."""
        return ()

    def memory(self, work: Workload) -> EditorMemory:
        context = 2 * REQUEST * (self.facts + self.demonstrations) + REQUEST
        is_encoded = self.retriever != BM25
        entry = TEXT_BYTES * (1 + self.demonstrations) + EMBEDDING_BYTES * is_encoded
        return EditorMemory(
            working=work.forward(context, context) + work.logits(REQUEST),
            kept=float(ENCODER_BYTES * is_encoded),
            beside=float(work.edits * entry),
            columns_per_edit=0,
        )

    def context_tokens(
        self, model: EditableModel, requests: Sequence[EditRequest], pool: Sequence[EditRequest]
    ) -> int:
        entries = self.entries(requests, pool)
        texts = [put(self.question, "."), *(put(self.fact, entry.fact) for entry in entries)]
        question, *facts = _lengths(model, texts)
        examples = _lengths(model, [entry.examples for entry in entries])
        return question + sum(sorted(facts)[-self.facts :]) + max(examples)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        return self._empty(model).state()

    def attach(self, model: EditableModel, state: TensorState) -> tuple[AbstractBeside, ...]:
        return (self._memory(model, state),)

    def plan(self, step: Step) -> TextPlan:
        """Nothing is searched: the probabilities are those without and with the context.

        Raises:
            OptionError: no requests are at hand that demonstrations could be made of.
        """
        if len(step.pool) < self.demonstrations:
            problem = "demonstrations are made of other requests, and there are too few"
            fix = "edit in a run, give `edit` a pool of requests, or set demonstrations=0"
            got, expected = len(step.pool), f"at least {self.demonstrations}"
            raise OptionError(
                message("demonstrations", problem, got=got, expected=expected, fix=fix)
            )
        before = self._memory(step.model, step.state)
        after = before.with_entries(self.entries(step.requests, step.pool))
        then, now = (self._probability(step, memory) for memory in (before, after))
        summary = {"probability_before": then, "probability_after": now}
        return TextPlan(
            summary=summary,
            nonfinite=None if math.isfinite(now) else "probability",
            memory=after,
        )

    def propose(self, step: Step, plan: TextPlan) -> TensorState:
        return plan.memory.state()

    @cached_property
    def _lookup(self) -> Retriever:
        """With an encoder that stays loaded."""
        return Retriever(name=self.retriever)

    def _empty(self, model: EditableModel) -> TextMemory:
        return TextMemory(
            retriever=self._lookup,
            wording=Wording(fact=self.fact, question=self.question, confirmation=self.confirmation),
            facts=self.facts,
            threshold=self.threshold,
            chat=model.chat,
            entries=(),
            keys_NE=self._lookup.embed([]),
        )

    def _memory(self, model: EditableModel, state: TensorState) -> TextMemory:
        return replace(self._empty(model), entries=entries_of(state), keys_NE=state["keys"])

    def _probability(self, step: Step, memory: TextMemory) -> float:
        """Mean over the batch of the probability (the geometric mean over the target's tokens)
        with this memory before the prompts.
        """
        prompts = [request.full_prompt for request in step.requests]
        read = memory.read_as(prompts, step.model.reader.choose)
        asked = [
            request if text is None else replace(request, prompt=text, subject="")
            for request, text in zip(step.requests, read, strict=True)
        ]
        with torch.no_grad():
            return float(log_probabilities(step.model, asked, "target")().exp().mean())

    # Entries

    def entries(self, requests: Sequence[EditRequest], pool: Sequence[EditRequest]) -> list[Entry]:
        """What the memory holds of each request.

        Args:
            pool: the first `self.pool` of them are what demonstrations are made of.
        """
        return [
            Entry(
                prompt=request.full_prompt,
                fact=joined(request.probe()),
                examples=self._examples(request, pool),
            )
            for request in requests
        ]

    def _examples(self, request: EditRequest, pool: Sequence[EditRequest]) -> str:
        """The demonstrations of one edit as a text."""
        if not self.demonstrations:
            return ""
        others = [other for other in pool[: self.pool] if other.id != request.id]
        facts = [joined(other.probe()) for other in others]
        keys_NE = self._lookup.embed(facts)
        found = self._lookup.nearest(joined(request.probe()), facts, keys_NE, self.demonstrations)
        shown = [
            put(self.fact, facts[index])
            + put(self.question, joined(demonstrated(others[index], rank)))
            + BETWEEN
            for rank, (index, _) in enumerate(found)
        ]
        return "".join(reversed(shown))


def demonstrated(other: EditRequest, rank: int) -> Probe:
    """What a demonstration asks and answers. Where a request has no such prompt, it copies."""
    kind = KINDS[rank % len(KINDS)]
    if kind == "update" and other.paraphrases:
        return other.probe(prompt=other.paraphrases[rank % len(other.paraphrases)])
    if kind == "retain" and (near := list(_near(other))):
        return near[rank % len(near)]
    return other.probe()


def _near(other: EditRequest) -> Iterator[Probe]:
    yield from other.neighbours
    for probes in other.locality.values():
        yield from probes


def _lengths(model: EditableModel, texts: Sequence[str]) -> list[int]:
    return [len(encoded.ids) for encoded in encode(model.tokenizer, texts, chat=model.chat)]
