"""The requests of commonsense statements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.datasets import load, problems_of


def statement(**changes: Any) -> dict[str, Any]:
    record = {
        "id": 7,
        "prompt": "Furnishings make noise",
        "label": " False",
        "predicted_label": "True",
        "subject": "Furnishings",
        "verb": "make",
        "object": "noise",
        "affected_paraphrase": ["Furniture is noisy"],
        "affected_reasoning": ["Furnishings are inanimate"],
        "affected_neighborhood_subject": ["Fixtures make noise"],
        "affected_neighborhood_verb": ["Furnishings emit noise"],
        "affected_neighborhood_object": ["Furnishings make din"],
        "unaffected_neighborhood_subject": ["Animals make noise"],
        "unaffected_neighborhood_object": ["Furnishings make heat"],
    }
    return record | changes


def test_a_statement_is_judged_after_a_colon(tmp_path: Path) -> None:
    (request,) = load("csk", [statement()], tmp_path).requests
    assert (request.id, request.prompt, request.subject) == (
        "csk/20q/7",
        "{} make noise:",
        "Furnishings",
    )
    assert (request.target, request.target_old, request.paraphrases) == (
        "False",
        "True",
        ("Furniture is noisy:",),
    )
    assert {
        kind: [(probe.prompt, probe.answer) for probe in probes]
        for kind, probes in request.portability.items()
    } == {
        "affected_subject": [("Fixtures make noise:", "False")],
        "affected_verb": [("Furnishings emit noise:", "False")],
        "affected_object": [("Furnishings make din:", "False")],
        "reasoning": [("Furnishings are inanimate:", "True")],
    }
    assert {
        kind: [probe.prompt for probe in probes] for kind, probes in request.locality.items()
    } == {
        "unaffected_subject": ["Animals make noise:"],
        "unaffected_object": ["Furnishings make heat:"],
    }


@pytest.mark.parametrize(
    ("part", "prompt"), [("verb", "Furnishings {} noise:"), ("object", "Furnishings make {}:")]
)
def test_a_statement_can_be_edited_at_its_verb_or_object_and_results_name_the_part(
    part: str, prompt: str, tmp_path: Path
) -> None:
    loaded = load("csk", [statement()], tmp_path, edit_at=part)
    assert (loaded.requests[0].prompt, loaded.label) == (prompt, f"csk edit_at={part}")


def test_plain_and_rewritten_statements_are_read(tmp_path: Path) -> None:
    rewrite = {
        "prompt": "Cats fly:",
        "target_new": {"str": "False"},
        "target_true": {"str": "True"},
        "subject": "Cats",
    }
    plain = {"prompt": "Dogs swim", "label": 1}
    records = [{"case_id": 3, "requested_rewrite": rewrite}, plain]
    (problem,) = problems_of("csk", records, tmp_path)
    assert problem.startswith(
        "record 1: subject: is missing (got no annotation). Fix: set dataset.annotations=[FILE,...] to"
    )
    annotated = tmp_path / "annotated.json"
    annotated.write_text(json.dumps([plain | {"subject": "Dogs", "verb": "swim", "object": None}]))
    loaded = load("csk", records, tmp_path, annotations=[str(annotated)])
    assert [(request.full_prompt, request.target) for request in loaded.requests] == [
        ("Cats fly:", "False"),
        ("Dogs swim:", "True"),
    ]
    assert loaded.requests[1].prompt == "{} swim:" and set(loaded.variant) == {
        "edit_at",
        "annotations",
    }


@pytest.mark.parametrize("label", [2, True, "maybe", None])
def test_a_label_that_is_no_judgement_is_an_error(label: object, tmp_path: Path) -> None:
    (problem,) = problems_of("csk", [statement(label=label)], tmp_path)[:1]
    assert (
        "label: is no judgement" in problem
        and f"(got {label!r}; expected True, False, 1 or 0)" in problem
    )
