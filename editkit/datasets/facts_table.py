"""The bundled table of real-world facts: relations with their wordings, and facts.

The files are in `editkit/assets/facts`; its README says how they were written.

    facts.tsv       relation, object, subjects (separated by "; ")
    relations.json  by relation: the kinds of its subjects and objects, wordings, generation prompts
    aliases.tsv     name, other names (separated by "; ")
    contexts.txt    sentences without a fact of the table, one a line
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

FILES = ("facts.tsv", "relations.json", "aliases.tsv", "contexts.txt")
SEPARATOR = "; "


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """One kind of fact. Every template contains one "{}" for the subject."""

    name: str
    subject: str  # the kind of its subjects: "country", "person"
    object: str  # the kind of its objects
    wordings: tuple[str, ...]  # each ends before the object; the first is the prompt of the edits
    generation: tuple[str, ...]  # beginnings of texts about the subject
    # For questions about more than one fact: a noun phrase that stands for the object, and a
    # wording that takes such a phrase for its subject.
    phrase: str
    question: str
    # Groups of objects, of which another one may be true as well, or nearly so, of a subject of
    # this one ("novelist", "poet"). None of them is the false target of another.
    close: tuple[frozenset[str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A true fact."""

    relation: Relation
    subject: str
    object: str

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts in all wordings of the relation, in the relation's order."""
        return tuple(wording.replace("{}", self.subject) for wording in self.relation.wordings)


@dataclass(frozen=True, kw_only=True)
class Table:
    """All facts, in the order of the file."""

    relations: Mapping[str, Relation]
    facts: tuple[Fact, ...]
    aliases: Mapping[str, tuple[str, ...]]  # other names, by name
    contexts: tuple[str, ...]
    digest: str  # sha256 of the files

    @cached_property
    def by_relation(self) -> Mapping[str, tuple[Fact, ...]]:
        """The facts of each relation."""
        return {
            name: tuple(fact for fact in self.facts if fact.relation.name == name)
            for name in self.relations
        }

    @cached_property
    def by_object(self) -> Mapping[tuple[str, str], tuple[Fact, ...]]:
        """The facts of each pair of relation and object."""
        grouped: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.facts:
            grouped.setdefault((fact.relation.name, fact.object), []).append(fact)
        return {key: tuple(facts) for key, facts in grouped.items()}

    @cached_property
    def by_subject(self) -> Mapping[tuple[str, str], tuple[Fact, ...]]:
        """The facts of each pair of a subject's kind and the subject."""
        grouped: dict[tuple[str, str], list[Fact]] = {}
        for fact in self.facts:
            grouped.setdefault((fact.relation.subject, fact.subject), []).append(fact)
        return {key: tuple(facts) for key, facts in grouped.items()}

    def are_close(self, relation: Relation, one: str, other: str) -> bool:
        """Whether both objects may be true of the same subject: they are the same, names of the
        same thing, or in one group of the relation.
        """
        return (
            one == other
            or one in self.aliases.get(other, ())
            or other in self.aliases.get(one, ())
            or any(one in group and other in group for group in relation.close)
        )


def read_table() -> Table:
    """The bundled table."""
    folder = Path(str(importlib.resources.files("editkit"))) / "assets" / "facts"
    content = {name: (folder / name).read_bytes() for name in FILES}
    text = {name: value.decode() for name, value in content.items()}
    relations = {
        name: _relation(name, values) for name, values in json.loads(text["relations.json"]).items()
    }
    return Table(
        relations=relations,
        facts=tuple(
            Fact(relation=relations[relation], subject=subject, object=object_)
            for relation, object_, subjects in _rows(text["facts.tsv"])
            for subject in subjects.split(SEPARATOR)
        ),
        aliases={name: tuple(names.split(SEPARATOR)) for name, names in _rows(text["aliases.tsv"])},
        contexts=tuple(text["contexts.txt"].splitlines()),
        digest=hashlib.sha256(b"".join(content.values())).hexdigest(),
    )


def _relation(name: str, values: Mapping[str, Any]) -> Relation:
    return Relation(
        name=name,
        subject=values["subject"],
        object=values["object"],
        wordings=tuple(values["wordings"]),
        generation=tuple(values["generation"]),
        phrase=values["phrase"],
        question=values["question"],
        close=tuple(frozenset(group) for group in values.get("close", ())),
    )


def _rows(text: str) -> Iterator[list[str]]:
    """The cells of each row below the header."""
    return (line.split("\t") for line in text.splitlines()[1:])


def statements(table: Table, *, seed: int, num_documents: int) -> Iterator[str]:
    """Short texts about the facts as they are, at most one for each wording of a fact: a sentence
    about something else, then the fact.
    """
    generator = random.Random(f"statements/{seed}")
    wordings = [(fact, prompt) for fact in table.facts for prompt in fact.prompts]
    generator.shuffle(wordings)
    for fact, prompt in wordings[:num_documents]:
        yield f"{generator.choice(table.contexts)} {prompt} {fact.object}."
