"""The requests of WikiBigEdit, UltraEditBench and QAEdit, and the files that are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editkit.datasets.base import without_subjects
from editkit.errors import ConfigError
from editkit.types import Probe
from tests.support.datasets import construct_dataset, load, problems_of


def changed(**changes: Any) -> dict[str, Any]:
    return {
        "tag": "new",
        "subject": "Ada Lyle",
        "relation": "employer",
        "object": "Norwood",
        "update": "Who employs Ada Lyle?",
        "ans": "Norwood",
        "rephrase": "Which firm does Ada Lyle work for?",
        "personas": "So, mate, who pays Ada Lyle these days?",
        "loc": "Who employs Ada Lowe?",
        "loc_ans": "Sutton",
        "mhop": "Where is the employer of Ada Lyle based?",
        "mhop_ans": "Fell",
    } | changes


def fact(**changes: Any) -> dict[str, Any]:
    return {
        "prompt": "What is the capital of Lower Wold?",
        "subject": "Lower Wold",
        "rephrase_prompt": "Which city governs Lower Wold?",
        "ans": "Tamby",
        "loc": "Who wrote Dry Land?",
        "loc_ans": "Bo Marsh",
    } | changes


def question(**changes: Any) -> dict[str, Any]:
    return {
        "id": 7,
        "source": "SQA",
        "prompt": "In which year was the Fell Bridge built?",
        "target": "1902",
        "subject": "Fell Bridge",
        "rephrase": "When was the Fell Bridge finished?",
        "locality": [{"loc": "who sings dry land", "loc_ans": "Bo Marsh"}],
    } | changes


RECORDS = {"wikibigedit": changed(), "ultraeditbench": fact(), "qaedit": question()}


def test_a_changed_fact_has_its_persona_its_hop_and_a_fact_that_did_not_change(
    tmp_path: Path,
) -> None:
    (request,) = load("wikibigedit", [changed()], tmp_path).requests
    assert (request.id, request.prompt, request.subject, request.target, request.target_old) == (
        "wikibigedit/0",
        "Who employs {}?",
        "Ada Lyle",
        "Norwood",
        None,
    )
    assert request.paraphrases == ("Which firm does Ada Lyle work for?",)
    assert request.portability == {
        "personas": (Probe(prompt=changed()["personas"], answer="Norwood"),),
        "multi_hop": (Probe(prompt=changed()["mhop"], answer="Fell"),),
    }
    assert request.locality == {
        "unchanged_fact": (Probe(prompt="Who employs Ada Lowe?", answer="Sutton"),)
    }


@pytest.mark.parametrize("empty", [None, float("nan"), "", " "])
def test_empty_cells_of_a_changed_fact_are_no_questions(empty: Any, tmp_path: Path) -> None:
    record = changed(mhop=empty, mhop_ans=empty, personas=empty, loc_ans=empty)
    loaded = load("wikibigedit", [record], tmp_path)
    assert (loaded.requests[0].portability, loaded.requests[0].locality) == ({}, {})
    assert loaded.left_out == {"loc: no answer": 1}


def test_the_files_of_wikibigedits_pipeline_have_other_names(tmp_path: Path) -> None:
    names = {"update": "src", "ans": "alt", "personas": "genv2_mixed"}
    record = {names.get(name, name): value for name, value in changed().items()}
    assert (
        load("wikibigedit", [record], tmp_path).requests
        == load("wikibigedit", [changed()], tmp_path).requests
    )


def test_a_folder_holds_the_periods_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, subject in (("b_2", "Bo"), ("a_1", "Al")):
        records = [changed(subject=subject, update=f"Who employs {subject}?")]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    loaded = construct_dataset("wikibigedit", path=str(tmp_path)).load(0)
    assert [request.subject for request in loaded.requests] == ["Al", "Bo"]
    before = loaded.digest
    (tmp_path / "b_2.json").write_text(json.dumps([changed(), changed(ans="")]))
    dataset = construct_dataset("wikibigedit", path=str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        dataset.load(0)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{tmp_path}, b_2.json, record 1: ans: is empty")
    skipping = construct_dataset("wikibigedit", path=str(tmp_path), on_bad_record="skip").load(0)
    assert len(skipping.requests) == 2 and skipping.digest != before
    (tmp_path / "b_2.json").write_text("[1,")
    (tmp_path / "a_1.json").write_text("7")
    with pytest.raises(ConfigError) as caught:
        dataset.load(0)
    assert len(caught.value.problems) == 2, "all files are looked at"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no file of records .*expected \*\.json"):
        construct_dataset("wikibigedit", path=str(tmp_path / "empty")).load(0)


def test_all_files_of_a_hub_folder_are_read_if_there_is_no_local_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("EDITKIT_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository, commit = tmp_path / "datasets--lukasthede--WikiBigEdit", "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for number in (1, 2):
        (snapshot / f"wiki_big_edit_{number}.json").write_text(json.dumps([changed()]))
    loaded = construct_dataset("wikibigedit").load(0)
    assert len(loaded.requests) == 2
    assert loaded.origin == "hub dataset lukasthede/WikiBigEdit, *.json"


def test_a_fact_of_ultraeditbench_has_an_unrelated_question(tmp_path: Path) -> None:
    (request,) = load("ultraeditbench", [fact()], tmp_path).requests
    assert (request.prompt, request.subject, request.target) == (
        "What is the capital of {}?",
        "Lower Wold",
        "Tamby",
    )
    assert request.paraphrases == ("Which city governs Lower Wold?",)
    assert request.locality == {
        "unrelated": (Probe(prompt="Who wrote Dry Land?", answer="Bo Marsh"),)
    }


def test_json_lines_and_a_list_of_ultraeditbench_are_the_same(tmp_path: Path) -> None:
    facts = [fact(), fact(subject="Wold", ans="Ely")]
    lines = "".join(f"{json.dumps(each)}\n" for each in facts)
    assert (
        load("ultraeditbench", lines, tmp_path).requests
        == load("ultraeditbench", facts, tmp_path).requests
    )
    problems = problems_of("ultraeditbench", lines + json.dumps(fact(loc=None)), tmp_path)
    assert problems[0].startswith("line 3: loc: is missing (expected a text)")


def test_a_question_of_qaedit_has_unrelated_questions_of_natural_questions(tmp_path: Path) -> None:
    (request,) = load("qaedit", [question()], tmp_path).requests
    assert (request.prompt, request.target, request.paraphrases) == (
        "In which year was the {} built?",
        "1902",
        ("When was the Fell Bridge finished?",),
    )
    assert request.locality == {
        "out_of_distribution": (Probe(prompt="who sings dry land", answer="Bo Marsh"),)
    }


@pytest.mark.parametrize(
    ("option", "changes", "problem"),
    [
        ("wikibigedit", {"update": None}, "update: is missing (expected a text)"),
        ("wikibigedit", {"loc": 7}, "loc: is not a text but of type int (got 7)"),
        ("ultraeditbench", {"ans": 3}, "ans: is not a text but of type int (got 3)"),
        ("ultraeditbench", {"subject": "Ely"}, "prompt: does not hold the subject"),
        ("qaedit", {"locality": {"loc": "x"}}, "locality: is not a list but of type dict"),
        ("qaedit", {"locality": [{"loc": "x"}]}, "locality[0].loc_ans: is missing"),
    ],
)
def test_a_problem_names_its_record_and_field(
    option: str, changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    good = RECORDS[option]
    problems = problems_of(option, [good, good | changes], tmp_path)
    place = "record 1 (id 7): " if "id" in good else "record 1: "
    assert any(text.startswith(f"{place}{problem}") for text in problems), problems


@pytest.mark.parametrize("option", RECORDS)
def test_a_record_without_a_subject_is_marked_where_it_is_allowed(
    option: str, tmp_path: Path
) -> None:
    record = RECORDS[option] | {"subject": None}
    assert any(
        text.partition(": ")[2].startswith("subject: is missing")
        for text in problems_of(option, [record], tmp_path)
    )
    last = load(option, [record], tmp_path, subject="last_token")
    assert last.requests[0].subject == "" and last.provenance()["edited_at_last_token"]
    path = tmp_path / "records.json"
    unneeded = without_subjects(construct_dataset(option, path=str(path))).load(0)
    assert unneeded.provenance()["without_subject"] == [f"{option}/0"]
