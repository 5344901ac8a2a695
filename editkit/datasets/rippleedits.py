"""RippleEdits (Cohen et al. 2023, arXiv 2307.12976): edits of Wikidata with six kinds of tests of
what else changes and what does not.

    edit                prompt (a statement with its object and a full stop), relation, subject_id,
                        target_id, and except in RECENT original_fact: the statement before the edit
    <kind>              [{test_queries: [query], test_condition, condition_queries}]
    query               prompt, answers: [{value, aliases}], target_ids and more

The layout was read in the README of edenbiran/RippleEdits and in `src/benchmark.py`, `fact.py`,
`query.py` and `relation.py`. The code calls original_fact previous_fact, and the README once
writes Relation_Specifity; all four are read.

A statement names neither its subject nor its object. They are found by the words around the subject
in the statements of a relation, which relation.py lists.

What differs from the paper's evaluation: each query is a question of its own, and one name of one
answer is enough (there, a test is a condition on several queries and needs every answer). The
condition queries, which decide by the model what is tested, are not asked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from editkit.datasets.fields import Fields, shortened
from editkit.datasets.files import AbstractRecordFiles
from editkit.types import EditRequest, Probe

_PORTABILITY = {
    "Logical_Generalization": "logical_generalization",
    "Subject_Aliasing": "alias",
    "Compositionality_I": "compositionality_i",
    "Compositionality_II": "compositionality_ii",
}
_LOCALITY = {
    "Relation_Specificity": "relation_specificity",
    "Relation_Specifity": "relation_specificity",
    "Forgetfulness": "forgetfulness",
}
# Relation -> the words just before the subject, and those between it and the object. Of any other
# relation they are "<name of the relation> of" and "is".
_AROUND = {
    "AWARD_RECEIVED": ("award", "won is"),
    "CAPITAL": ("capital city of", "is"),
    "CAPITAL_OF": ("country which", "is the capital of is"),
    "CAST_MEMBER": ("cast members of", "are"),
    "CONTINENT": ("continent which", "is part of is"),
    "COUNTRY": ("country which", "is associated with is"),
    "CURRENCY": ("currency in", "is"),
    "ETHNIC_GROUP": ("ethnic group which", "is associated with is"),
    "FOLLOWED_BY": ("", "is followed by"),
    "FOLLOWS": ("", "follows"),
    "LEAGUE": ("league which", "plays in is"),
    "LIKELY_ANTHEM": ("performed in", "is"),
    "MEMBER_OF_SPORTS_TEAM": ("sports team which", "is a member of is"),
    "NATIVE_LANGUAGE": ("mother tongue of", "is"),
    "NUMBER_OF_CHILDREN": ("number of children", "has is"),
    "POSITION_HELD": ("position held by", "is"),
    "RELIGION": ("religion which", "is associated with is"),
    "SEX_OR_GENDER": ("gender of", "is"),
    "SIBLING": ("siblings of", "are"),
}


@dataclass(frozen=True, kw_only=True)
class RippleEdits(AbstractRecordFiles):
    """Edits with tests of their consequences."""

    advice: ClassVar[str] = (
        "The files: https://github.com/edenbiran/RippleEdits, folder data/benchmark"
    )

    def parse(self, fields: Fields, index: int) -> list[EditRequest]:
        if not any(isinstance(fields.get(kind), list) for kind in (*_PORTABILITY, *_LOCALITY)):
            fields.note("record", "has no tests", expected=f"lists {', '.join(_PORTABILITY)}, ...")
        before, subject, after, target = _taken_apart(fields)
        old = _old_target(fields, f"{before}{subject}{after}")
        if old is not None and old == target:
            fields.remark("the target is the object before the edit")
        return [
            EditRequest(
                id=f"{self.name}/{index}",
                prompt=f"{before}{{}}{after}",
                subject=subject,
                target=target,
                target_old=None if old == target else old,
                locality=_kinds(fields, _LOCALITY, target),
                portability=_kinds(fields, _PORTABILITY, target),
            )
        ]


def _taken_apart(fields: Fields) -> tuple[str, str, str, str]:
    """What stands before the subject of the edit's statement, the subject, what stands between it
    and the object, and the object.
    """
    statement, relation = fields.text("edit.prompt").removesuffix("."), fields.text("edit.relation")
    if "{}" in statement:
        fields.note("edit.prompt", 'holds "{}", which marks the subject', got=shortened(statement))
    words, verb = _AROUND.get(relation, (f"{relation.lower().replace('_', ' ')} of", "is"))
    start = statement.find(f"{words} ") + len(words) + 1 if words else 0
    verb = f" {verb}"
    ends = [found.start() for found in re.finditer(rf"{re.escape(verb)} (?=\S)", statement)]
    ends = [end for end in ends if end > start]
    if len(ends) > 1:  # the subject or the object holds the verb, too
        ends = _likely(fields, statement, ends, verb)
    if len(ends) != 1 or (words and f"{words} " not in statement):
        if statement and relation:
            fields.note(
                "edit.prompt",
                "cannot be taken apart" if not ends else "can be taken apart in several ways",
                got=shortened(statement),
                expected=f"one ... {words} <subject>{verb} <object>.",
            )
        return "", "", "", ""
    subject, target = statement[start : ends[0]], statement[ends[0] + len(verb) + 1 :]
    return statement[:start], subject.strip(), verb, target.strip()


def _likely(fields: Fields, statement: str, ends: list[int], verb: str) -> list[int]:
    """The ends of the subject that fit a name of the object, which the tests have by its id, or the
    statement before the edit, which differs from here on.
    """
    names = _names_of(fields, fields.get("edit.target_id"))
    by_name = [end for end in ends if statement[end + len(verb) + 1 :] in names]
    if by_name:
        return by_name
    old = _old_statement(fields) or ""
    return [end for end in ends if old.startswith(statement[: end + len(verb)])][-1:] or ends


def _names_of(fields: Fields, target_id: object) -> set[str]:
    """The names of an entity in the answers of the tests."""
    return {
        name
        for kind in (*_PORTABILITY, *_LOCALITY)
        for query in _queries(fields, kind)
        if query.get("target_ids") == [target_id]
        for names in _answers(query)
        for name in names
    }


def _old_statement(fields: Fields) -> str | None:
    key = "original_fact" if fields.get("edit.original_fact") is not None else "previous_fact"
    statement = fields.optional_text(f"edit.{key}.prompt")
    return None if statement is None else statement.removesuffix(".")


def _old_target(fields: Fields, stem: str) -> str | None:
    """The object before the edit; None if the record has none."""
    statement = _old_statement(fields)
    if statement is None or not stem:
        return None
    if not statement.startswith(stem):
        fields.remark("the statement before the edit begins otherwise")
        return None
    return statement.removeprefix(stem).strip() or None


def _queries(fields: Fields, kind: str) -> Iterator[Fields]:
    if fields.get(kind) is not None:
        for test in fields.parts(kind):
            yield from test.parts("test_queries")


def _answers(query: Fields) -> list[list[str]]:
    """The names of each answer, without blank ones; its first name is its value."""
    answers = []
    for answer in query.parts("answers"):
        aliases = answer.get("aliases")
        names = [answer.get("value"), *(aliases if isinstance(aliases, list) else [])]
        for name in names:
            if not isinstance(name, str):
                answer.note("value", "or an alias is no text", got=shortened(name))
        kept = [name.strip() for name in names if isinstance(name, str) and name.strip()]
        answers += [kept] if kept else []
    return answers


def _kinds(fields: Fields, names: dict[str, str], target: str) -> dict[str, tuple[Probe, ...]]:
    """The questions by kind, without empty kinds."""
    probes_by_kind: dict[str, tuple[Probe, ...]] = {}
    for key, kind in names.items():
        read = [_probe(query, kind, target) for query in _queries(fields, key)]
        probes = tuple(probe for probe in read if probe is not None)
        if probes:
            probes_by_kind[kind] = probes
    return probes_by_kind


def _probe(query: Fields, kind: str, target: str) -> Probe | None:
    """One question; None, with a count in `left_out`, if it has no usable answer."""
    prompt, answers = query.text("prompt"), _answers(query)
    if answers and kind == "forgetfulness":
        # "..., which is not <target>, is": the target contradicts the question, as in KnowEdit.
        answers = [names for names in answers if target not in names]
        if not answers:
            query.leave_out(
                "forgetfulness: the only answer is the target, which the question excludes"
            )
            return None
    if not answers:
        query.leave_out(f"{kind}: no answer")
        return None
    (answer, *aliases) = dict.fromkeys(name for names in answers for name in names)
    return Probe(prompt=prompt, answer=answer, aliases=tuple(aliases))
