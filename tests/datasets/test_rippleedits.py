"""The requests of RippleEdits: the statement of an edit is taken apart, its tests are questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from editkit.types import Probe
from tests.support.datasets import load, problems_of


def query(prompt: str, *names: str, target_ids: object = None, **further: Any) -> dict[str, Any]:
    """A query with one answer: its value and its aliases."""
    answers = [{"value": names[0], "aliases": list(names[1:])}] if names else []
    return {"prompt": prompt, "answers": answers, "target_ids": target_ids} | further


def queried(*queries: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"test_queries": list(queries), "test_condition": "OR", "condition_queries": []}]


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "example_type": "popular",
        "edit": edit("The name of the mother of Ada Lyle is Bo.", "MOTHER", old="Cy Lyle"),
        "Relation_Specificity": queried(query("The gender of Ada Lyle is", "female", "woman")),
        "Logical_Generalization": queried(query("The names of the siblings of Ada Lyle are", "Di")),
        "Subject_Aliasing": queried(query("The name of the mother of A. Lyle is", "Bo")),
        "Compositionality_I": queried(query("The name of the mother of the mother is", "El")),
        "Compositionality_II": queried(query("The grandmother of Fi is", "Bo")),
        "Forgetfulness": [],
    } | changes


def edit(
    statement: str, relation: str, *, old: str | None = None, **further: Any
) -> dict[str, Any]:
    """An edit; its old statement has another object in the same place."""
    known = {} if old is None else {"original_fact": {"prompt": statement.replace("Bo", old)}}
    return {"prompt": statement, "relation": relation, "target_id": "Q1"} | known | further


def test_an_edit_is_taken_apart_and_each_query_is_a_question(tmp_path: Path) -> None:
    (request,) = load("rippleedits", [entry()], tmp_path).requests
    assert (request.id, request.prompt, request.subject) == (
        "rippleedits/0",
        "The name of the mother of {} is",
        "Ada Lyle",
    )
    assert (request.target, request.target_old) == ("Bo", "Cy Lyle")
    assert list(request.portability) == [
        "logical_generalization",
        "alias",
        "compositionality_i",
        "compositionality_ii",
    ]
    assert request.portability["alias"][0].answer == "Bo"
    assert request.locality == {
        "relation_specificity": (
            Probe(prompt="The gender of Ada Lyle is", answer="female", aliases=("woman",)),
        )
    }


@pytest.mark.parametrize(
    ("statement", "relation", "subject", "target"),
    [
        ("The name of the author of Dry Land is Bo Marsh.", "AUTHOR", "Dry Land", "Bo Marsh"),
        ("The name of the country of citizenship of Ada is Wold.", "COUNTRY_OF_CITIZENSHIP", "Ada", "Wold"),
        ("The name of the country which Fell is the capital of is Wold.", "CAPITAL_OF", "Fell", "Wold"),
        ("The name of the continent which Wold is part of is Asia.", "CONTINENT", "Wold", "Asia"),
        ("Cup II is followed by Cup III.", "FOLLOWED_BY", "Cup II", "Cup III"),
        ("Cup II follows Cup I.", "FOLLOWS", "Cup II", "Cup I"),
        ("The names of the siblings of Ada are Bo.", "SIBLING", "Ada", "Bo"),
        ("The number of children Ada has is 3.", "NUMBER_OF_CHILDREN", "Ada", "3"),
        ("The name of the award Ada won is St. Bo Prize.", "AWARD_RECEIVED", "Ada", "St. Bo Prize"),
    ],
)  # fmt: skip
def test_the_words_of_a_relation_stand_around_its_subject(
    statement: str, relation: str, subject: str, target: str, tmp_path: Path
) -> None:
    (request,) = load("rippleedits", [entry(edit=edit(statement, relation))], tmp_path).requests
    assert (request.subject, request.target) == (subject, target)
    assert request.full_prompt + f" {target}." == statement


LIFE = "The name of the author of Life is short is Bo."


def test_a_subject_that_holds_the_verb_is_known_by_the_object_or_the_old_statement(
    tmp_path: Path,
) -> None:
    by_name = entry(
        edit=edit(LIFE, "AUTHOR"),
        Subject_Aliasing=queried(query("x", "Bo", target_ids=["Q1"])),
    )
    by_old = entry(edit=edit(LIFE, "AUTHOR", old="Cy"))
    for record in (by_name, by_old):
        (request,) = load("rippleedits", [record], tmp_path).requests
        assert (request.subject, request.target) == ("Life is short", "Bo")
    (problem,) = problems_of("rippleedits", [entry(edit=edit(LIFE, "AUTHOR"))], tmp_path)
    assert problem.startswith("record 0: edit.prompt: can be taken apart in several ways (got 'The")


def test_the_object_before_the_edit_may_be_unknown_the_same_or_named_as_in_the_code(
    tmp_path: Path,
) -> None:
    statement = "The gender of Ada is Bo."
    code = {"previous_fact": {"prompt": "The gender of Ada is Cy."}}
    entries = [
        entry(edit=edit(statement, "SEX_OR_GENDER", **code)),
        entry(edit=edit(statement, "SEX_OR_GENDER", old="Bo")),
        entry(edit=edit(statement, "SEX_OR_GENDER", old="")),
        entry(edit=edit(statement, "SEX_OR_GENDER", original_fact={"prompt": "Ada is Cy."})),
        entry(edit=edit(statement, "SEX_OR_GENDER")),
    ]
    loaded = load("rippleedits", entries, tmp_path)
    assert [request.target_old for request in loaded.requests] == ["Cy", None, None, None, None]
    assert loaded.remarks["the target is the object before the edit"] == 1
    assert loaded.remarks["the statement before the edit begins otherwise"] == 1


def test_a_question_without_a_usable_answer_is_left_out(tmp_path: Path) -> None:
    record = entry(
        Forgetfulness=queried(
            query("The mother of Ada, which is not Bo, is", "Bo"),
            query("The mother of Ada, which is not Bo, is", "Cy"),
        ),
        Relation_Specificity=queried(query("The gender of Ada Lyle is")),
    )
    loaded = load("rippleedits", [record], tmp_path)
    assert [probe.answer for probe in loaded.requests[0].locality["forgetfulness"]] == ["Cy"]
    assert loaded.left_out == {
        "relation_specificity: no answer": 1,
        "forgetfulness: the only answer is the target, which the question excludes": 1,
    }


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"edit": entry()["edit"]}, "record: has no tests"),
        (entry(edit={"prompt": "x"}), "edit.relation: is missing (expected a text)"),
        (
            entry(edit=edit("Ada has three children.", "CHILD")),
            "edit.prompt: cannot be taken apart (got 'Ada has three children'; expected one ... child of <subject> is <object>.)",
        ),
        (entry(Forgetfulness={"x": 1}), "Forgetfulness: is not a list but of type dict"),
        (
            entry(Forgetfulness=queried({"prompt": "x", "answers": "y"})),
            "Forgetfulness[0].test_queries[0].answers: is not a list but of type str",
        ),
        (
            entry(Compositionality_I=queried(query("x", "y") | {"answers": [{"value": 3}]})),
            "Compositionality_I[0].test_queries[0].answers[0].value: or an alias is no text (got 3)",
        ),
    ],
)
def test_a_problem_names_its_record_and_field(
    record: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    problems = problems_of("rippleedits", [entry(), record], tmp_path)
    assert any(text.startswith(f"record 1: {problem}") for text in problems), problems
