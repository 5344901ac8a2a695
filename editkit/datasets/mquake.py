"""MQuAKE (Zhong et al. 2023, arXiv 2305.14795): chains of facts, some of which are edited, and
questions about the whole chain.

    requested_rewrite   the edited facts: [{prompt with "{}", subject, target_new.str,
                        target_true.str, question}]
    questions           three wordings of one multi-hop question; new_answer and new_answer_alias
                        are its answer after the edits
    new_single_hops     [{question, answer, answer_alias}]: the chain after the edits, hop by hop
    orig                the same chain as Wikidata ids: edit_triples, new_triples

Each edited fact of a chain is a request, and the requests of a chain form a group. They are edited
one after another. The questions about the whole chain (multi-hop questions, hops) belong to its
last request, so that they are measured only after all of its edits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from editkit.datasets.base import AbstractDataset, LoadedDataset, OnBadRecord, Order, load_records
from editkit.datasets.fields import Fields
from editkit.datasets.records import find_records
from editkit.errors import OptionError, message
from editkit.types import EditRequest, Probe

_ADVICE = "The files: https://github.com/princeton-nlp/MQuAKE, folder datasets"

# (subject, relation) -> the objects in the edits of all chains
Edits = dict[tuple[object, object], set[object]]


@dataclass(frozen=True, kw_only=True)
class MQuAKE(AbstractDataset):
    """Chains of edited facts with multi-hop questions."""

    name: str
    path: str | None
    file: str  # file in $EDITKIT_DATA, used if path is null
    id: str | None  # hub dataset, used if there is no file
    question_format: str  # the prompt of a question, with "{}" for the question
    # chains with a fact that another chain edits to another object
    contradicted_chains: Literal["keep", "leave_out"]
    order: Order
    limit: int | None
    on_bad_record: OnBadRecord

    def __post_init__(self) -> None:
        if self.question_format.count("{}") != 1:
            raise OptionError(
                message(
                    "question_format",
                    "the template is malformed",
                    got=self.question_format,
                    expected='exactly one "{}" for the question',
                )
            )

    def load(self, seed: int) -> LoadedDataset:
        records = find_records(path=self.path, files=[self.file], hub_id=self.id, advice=_ADVICE)
        edits = _edits(records.records)
        return load_records(
            records,
            lambda fields, index: self._parse(fields, index, edits),
            name=self.name,
            order=self.order,
            seed=seed,
            limit=self.limit,
            on_bad_record=self.on_bad_record,
            variant=self._variant(),
        )

    def _variant(self) -> dict[str, str]:
        variant = {} if self.question_format == "{}" else {"question_format": self.question_format}
        return variant | (
            {} if self.contradicted_chains == "keep" else {"contradicted_chains": "left out"}
        )

    def _parse(self, fields: Fields, index: int, edits: Edits) -> list[EditRequest]:
        case_id = fields.get("case_id")
        group = f"{self.name}/{index if case_id is None else case_id}"
        facts = fields.parts("requested_rewrite")
        if fields.get("requested_rewrite") == []:
            fields.note("requested_rewrite", "is empty", expected="at least one edited fact")
        answer = fields.text("new_answer")
        aliases = _aliases(fields.optional_texts("new_answer_alias"), answer)
        questions = tuple(self._formatted(question) for question in fields.texts("questions"))
        hops = tuple(self._hop(hop) for hop in fields.parts("new_single_hops"))
        requests = []
        for number, fact in enumerate(facts):
            is_last = number == len(facts) - 1
            multi_hop = (
                tuple(
                    Probe(prompt=question, answer=answer, aliases=aliases) for question in questions
                )
                if is_last
                else ()
            )
            subject, question = fact.text("subject"), fact.optional_text("question")
            requests.append(
                EditRequest(
                    id=f"{group}/{number}",
                    prompt=fact.template("prompt", subject),
                    subject=subject,
                    target=fact.text("target_new.str"),
                    target_old=fact.text("target_true.str"),
                    paraphrases=() if question is None else (self._formatted(question),),
                    portability={"multi_hop": multi_hop} if multi_hop else {},
                    group=group,
                    hops=hops if is_last else (),
                )
            )
        if _is_contradicted(fields, edits):
            reason = "chains through a fact that another chain edits otherwise"
            if self.contradicted_chains == "leave_out" and not fields.problems:
                fields.leave_out(reason)
                return []
            fields.remark(reason)
        return requests

    def _formatted(self, question: str) -> str:
        return self.question_format.replace("{}", question)

    def _hop(self, hop: Fields) -> Probe:
        answer = hop.text("answer")
        return Probe(
            prompt=self._formatted(hop.text("question")),
            answer=answer,
            aliases=_aliases(hop.optional_texts("answer_alias"), answer),
        )


def _aliases(names: Sequence[str], answer: str) -> tuple[str, ...]:
    return tuple(name for name in dict.fromkeys(names) if name != answer)


def _triples(fields: Fields, key: str) -> list[Sequence[object]]:
    """Triples of Wikidata ids, used only to find contradictions; empty if the file has none."""
    value = fields.get(key)
    triples = value if isinstance(value, list) else []
    return [
        triple
        for triple in triples
        if isinstance(triple, list)
        and len(triple) == 3
        and all(isinstance(id, str) for id in triple)
    ]


def _edits(records: Sequence[object]) -> Edits:
    edits: Edits = defaultdict(set)
    for record in records:
        for subject, relation, target in _triples(Fields(record), "orig.edit_triples"):
            edits[subject, relation].add(target)
    return edits


def _is_contradicted(fields: Fields, edits: Edits) -> bool:
    """Whether another edit of the file changes a fact on which the chain's answer depends.

    MQuAKE-Remastered (ICLR 2025) counts such chains as errors.
    """
    triples = _triples(fields, "orig.new_triples")
    return any(
        edits.get((subject, relation), {target}) != {target}
        for subject, relation, target in triples
    )
