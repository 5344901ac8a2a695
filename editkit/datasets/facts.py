"""Requests that edit the bundled real-world facts, in the shape of CounterFact's.

Every choice goes by a hash of what is chosen, never by a generator: a fact that is added to the
table changes the requests that it takes part in, and no other.

A request of the fact (subject, relation, object) has

    target              a false object of the same relation that is not close to the true one
    paraphrases         two further wordings, the first after a sentence about something else
    neighbours          ten prompts about other subjects with the same true object; in further
                        wordings, as in CounterFact, where there are fewer than ten subjects. Where
                        no other subject has the object (capitals, chemical symbols): ten other
                        subjects of the relation, with their own true answers, none of them the
                        target
    attribute_prompts   the same about subjects of which the target is true
    generation_prompts  beginnings of texts about the subject
    references          texts that state the target of up to five subjects of which it is true
    portability         one_hop: a question about one further fact, which the target is the subject
                        of ("the capital of the country of Lyon"); two_hop: about two further
                        facts. A question whose answer the edit does not change is left out.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from editkit.datasets.base import AbstractDataset, LoadedDataset, Order, arrange
from editkit.datasets.facts_table import Fact, Relation, Table, read_table
from editkit.types import EditRequest, Probe

Split = Literal["all", "tune", "report"]
NUM_NEIGHBOURS = 10  # and attribute prompts, as in CounterFact
NUM_REFERENCES = 5  # subjects
NUM_QUESTIONS = 4  # of a kind of portability
TUNE_SHARE = 4  # one subject in so many is in the split `tune`
NO_NEIGHBOUR = (
    "requests whose true object no other subject has: their neighbours have other answers"
)
FEW_NEIGHBOURS = f"requests with fewer than {NUM_NEIGHBOURS} neighbours of the same true object"


@dataclass(frozen=True, kw_only=True)
class Facts(AbstractDataset):
    """Requests that make real-world facts false."""

    name: str
    split: Split  # by subject: no subject is in both tune and report
    order: Order
    limit: int | None

    def load(self, seed: int) -> LoadedDataset:
        table = read_table()
        edited = [fact for fact in table.facts if self.split in ("all", split_of(fact.subject))]
        edited.sort(key=lambda fact: _rank("order", fact.relation.name, fact.subject))
        arranged = arrange(
            [request(table, fact, name=self.name) for fact in edited],
            order=self.order,
            seed=seed,
            limit=self.limit,
        )
        remarks = {NO_NEIGHBOUR: 0, FEW_NEIGHBOURS: 0}
        for edit in arranged:
            if all(probe.answer != edit.target_old for probe in edit.neighbours):
                remarks[NO_NEIGHBOUR] += 1
            elif len(edit.neighbours) < NUM_NEIGHBOURS:
                remarks[FEW_NEIGHBOURS] += 1
        return LoadedDataset(
            name=self.name,
            requests=arranged,
            digest=table.digest,
            origin="the bundled table of facts",
            remarks={reason: number for reason, number in remarks.items() if number},
            variant={"split": self.split},
        )


def split_of(subject: str) -> Split:
    """The split of all facts about a subject."""
    return "report" if _number("split", subject) % TUNE_SHARE else "tune"


def request(table: Table, fact: Fact, *, name: str) -> EditRequest:
    """The request that makes a fact false. Its id begins with `name`."""
    relation, subject = fact.relation, fact.subject
    same_relation = table.by_relation[relation.name]
    objects = dict.fromkeys(other.object for other in same_relation)
    target = min(
        (object_ for object_ in objects if not table.are_close(relation, object_, fact.object)),
        key=lambda object_: _rank("target", relation.name, subject, object_),
    )
    neighbours = [
        other for other in table.by_object[relation.name, fact.object] if other.subject != subject
    ]
    if not neighbours:
        neighbours = [
            other
            for other in same_relation
            if other.subject != subject and not table.are_close(relation, other.object, target)
        ]
    true_of_target = table.by_object[relation.name, target]
    in_context, alone = sorted(fact.prompts[1:], key=lambda prompt: _rank("paraphrase", prompt))[:2]
    context = table.contexts[_number("context", relation.name, subject) % len(table.contexts)]
    return EditRequest(
        id=f"{name}/{relation.name}/{subject}",
        prompt=relation.wordings[0],
        subject=subject,
        target=target,
        target_old=fact.object,
        paraphrases=(f"{context} {in_context}", alone),
        neighbours=_probes(table, neighbours, "neighbour", subject),
        portability=_portability(table, fact, target),
        attribute_prompts=_probes(table, true_of_target, "attribute", subject),
        generation_prompts=tuple(start.replace("{}", subject) for start in relation.generation),
        references=tuple(
            " ".join(f"{prompt} {other.object}." for prompt in other.prompts[:3])
            for other in _ranked_facts(true_of_target, "reference", subject)[:NUM_REFERENCES]
        ),
    )


def _probes(table: Table, facts: Sequence[Fact], *purpose: str) -> tuple[Probe, ...]:
    """Up to ten prompts about these facts with their true answers: each fact in one wording, then
    each in another one, and so on.
    """
    ranked = []
    for fact in _ranked_facts(facts, *purpose)[:NUM_NEIGHBOURS]:
        start = _number(*purpose, fact.subject) % len(fact.prompts)
        prompts = (*fact.prompts[start:], *fact.prompts[:start])
        ranked.append([_probe(table, prompt, fact.object) for prompt in prompts])
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*ranked))
    return tuple(probe for probe in rounds if probe is not None)[:NUM_NEIGHBOURS]


def _probe(table: Table, prompt: str, answer: str) -> Probe:
    return Probe(prompt=prompt, answer=answer, aliases=table.aliases.get(answer, ()))


def _portability(table: Table, fact: Fact, target: str) -> dict[str, tuple[Probe, ...]]:
    """The questions by kind; a kind without questions is left out."""
    kinds = {"one_hop": 1, "two_hop": 2}
    probes = {
        kind: tuple(
            _probe(table, prompt, answer)
            for prompt, answer in sorted(
                _questions(table, fact, target, hops), key=lambda question: _rank(question[0])
            )
        )[:NUM_QUESTIONS]
        for kind, hops in kinds.items()
    }
    return {kind: of_kind for kind, of_kind in probes.items() if of_kind}


def _questions(table: Table, fact: Fact, target: str, hops: int) -> Iterator[tuple[str, str]]:
    """Questions and their answers after the edit. No kind of thing occurs twice in a question: "the
    country of the capital of France" would ask whether the edit contradicts itself.
    """
    start = fact.relation
    before = dict(_chains(table, (start,), fact.object, hops))
    for chain, answer in _chains(table, (start,), target, hops):
        last = chain[-1]
        if chain in before and table.are_close(last, before[chain], answer):
            continue
        phrase = fact.subject
        for relation in chain[:-1]:
            phrase = relation.phrase.replace("{}", phrase)
        yield last.question.replace("{}", phrase), answer


def _chains(
    table: Table, chain: tuple[Relation, ...], object_: str, hops: int
) -> Iterator[tuple[tuple[Relation, ...], str]]:
    """The chains of so many further facts from an object of the chain's last relation, and the
    object of the last fact.
    """
    if not hops:
        yield chain, object_
        return
    kinds = {chain[0].subject, *(relation.object for relation in chain)}
    for fact in table.by_subject.get((chain[-1].object, object_), ()):
        if fact.relation.object not in kinds:
            yield from _chains(table, (*chain, fact.relation), fact.object, hops - 1)


def _rank(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _number(*parts: str) -> int:
    return int(_rank(*parts)[:8], 16)


def _ranked_facts(facts: Iterable[Fact], *purpose: str) -> list[Fact]:
    return sorted(facts, key=lambda fact: _rank(*purpose, fact.subject))
