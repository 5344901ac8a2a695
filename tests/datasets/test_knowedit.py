"""The requests of KnowEdit records, and the files that are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editkit.errors import ConfigError
from editkit.types import Probe
from tests.support.datasets import construct_dataset, load, problems_of


def fact(**changes: Any) -> dict[str, Any]:
    record = {
        "subject": "Leo",
        "prompt": "The country of Leo is",
        "target_new": "Syria",
        "rephrase_prompt": "Leo's country is",
        "portability": {
            "Subject_Aliasing": [{"prompt": "The country of Leonardo is", "ground_truth": "Syria"}],
            "Reasoning": [
                {
                    "prompt": "The capital of Leo's country is",
                    "ground_truth": [["Damascus", "Dimashq"], ["Sham"]],
                }
            ],
            "Logical_Generalization": [],
        },
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The mother of Leo is", "ground_truth": ["Irmelin", "Irmelin D."]}
            ],
            "Forgetfulness": [
                {
                    "prompt": "The country of Leo, which is not Syria, is",
                    "ground_truth": [["Syria", "SY"], ["USA", "US"]],
                }
            ],
        },
    }
    return record | changes


def biography(**changes: Any) -> dict[str, Any]:
    locality = {
        "Relation_Specificity": [
            {"prompt": "The cause of death of rick is", "ground_truth": ["age"]}
        ]
    }
    return {
        "concept": "rick",
        "text": "This is about rick. Rick was born. ",
        "labels": "He sang.",
        "locality": locality,
    } | changes


def test_a_fact_of_knowedit_comes_with_its_kinds_of_portability_and_locality(
    tmp_path: Path,
) -> None:
    (request,) = load("knowedit_wiki_recent", [fact()], tmp_path).requests
    assert (request.id, request.prompt, request.subject) == (
        "knowedit_wiki_recent/0",
        "The country of {} is",
        "Leo",
    )
    assert (request.target, request.target_old, request.paraphrases) == (
        "Syria",
        None,
        ("Leo's country is",),
    )
    assert request.portability == {
        "alias": (Probe(prompt="The country of Leonardo is", answer="Syria"),),
        "reasoning": (
            Probe(
                prompt="The capital of Leo's country is",
                answer="Damascus",
                aliases=("Dimashq", "Sham"),
            ),
        ),
    }
    assert request.locality["relation_specificity"] == (
        Probe(prompt="The mother of Leo is", answer="Irmelin", aliases=("Irmelin D.",)),
    )


def test_the_answer_of_a_question_that_excludes_the_target_is_another_one(tmp_path: Path) -> None:
    question = "The country of Leo, which is not Syria, is"
    other = fact(
        prompt="The home of Leo is",
        locality={"Forgetfulness": [{"prompt": question, "ground_truth": [["Syria", "SY"]]}]},
    )
    loaded = load("knowedit_wiki_recent", [fact(), other], tmp_path)
    assert loaded.requests[0].locality["forgetfulness"] == (
        Probe(prompt=question, answer="USA", aliases=("US",)),
    )
    assert loaded.requests[1].locality == {}
    assert loaded.left_out == {
        "forgetfulness: the only answer is the target, which the question excludes": 1
    }


@pytest.mark.parametrize("truth", ["", [], [[]], [[], [" "]]])
def test_a_question_without_an_answer_is_left_out_of_its_record_and_counted(
    truth: object, tmp_path: Path
) -> None:
    questions = [
        {"prompt": "The mother of Leo is", "ground_truth": truth},
        {"prompt": "The son of Leo is", "ground_truth": "Tom"},
    ]
    loaded = load(
        "knowedit_wiki_recent", [fact(locality={"Relation_Specificity": questions})], tmp_path
    )
    assert [probe.answer for probe in loaded.requests[0].locality["relation_specificity"]] == [
        "Tom"
    ]
    assert (loaded.left_out, loaded.skipped) == ({"relation_specificity: no answer": 1}, {})


@pytest.mark.parametrize(
    ("truth", "old", "remarks"),
    [
        ("USA", "USA", {}),
        (["USA", "US"], "USA", {}),
        (["Syria"], None, {"the target is one of the true answers": 1}),
        (["Syria", "USA"], "USA", {"the target is one of the true answers": 1}),
    ],
)
def test_the_old_target_is_a_true_answer_other_than_the_new_one(
    truth: object, old: str | None, remarks: dict[str, int], tmp_path: Path
) -> None:
    loaded = load("knowedit_zsre", [fact(ground_truth=truth)], tmp_path)
    assert (loaded.requests[0].target_old, loaded.remarks) == (old, remarks)


def test_a_biography_is_continued_by_its_next_sentence(tmp_path: Path) -> None:
    (request,) = load("knowedit_wikibio", [biography()], tmp_path).requests
    assert (request.prompt, request.subject, request.target) == (
        "This is about {}. Rick was born.",
        "rick",
        "He sang.",
    )
    assert (request.paraphrases, request.portability, list(request.locality)) == (
        (),
        {},
        ["relation_specificity"],
    )


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": "x"}, "record: has neither subject (facts) nor concept (WikiBio)"),
        (
            fact(subject="Eve"),
            "prompt: does not hold the subject (got 'The country of Leo is'; expected a prompt with the subject 'Eve').",
        ),
        (
            fact(portability={"Alias": []}),
            "portability.Alias: is no known kind (expected one of Subject_Aliasing, Reasoning, Logical_Generalization).",
        ),
        (
            fact(locality=["x"]),
            "locality: is not an object with fields but of type list (got ['x']).",
        ),
        (
            fact(locality={"Forgetfulness": ["x"]}),
            "locality.Forgetfulness[0]: is not an object with fields but of type str (got 'x').",
        ),
        (
            fact(locality={"Forgetfulness": [{"prompt": "", "ground_truth": "USA"}]}),
            "locality.Forgetfulness[0].prompt: is empty (got ''; expected a text that is not blank).",
        ),
        (
            fact(portability={"Reasoning": [{"prompt": "x", "ground_truth": [["a"], [3]]}]}),
            "portability.Reasoning[0].ground_truth: holds a value of type int, not a text (got 3).",
        ),
        (
            fact(portability={"Reasoning": [{"prompt": "x"}]}),
            "portability.Reasoning[0].ground_truth: is neither a text nor a list (got None).",
        ),
    ],
)
def test_a_problem_of_a_knowedit_record_names_its_place_in_the_record(
    record: object, problem: str, tmp_path: Path
) -> None:
    assert any(
        text.startswith(f"record 1: {problem}")
        for text in problems_of("knowedit_wiki_recent", [fact(), record], tmp_path)
    )


def test_the_first_file_in_the_data_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITKIT_DATA", str(tmp_path))
    dataset = construct_dataset("knowedit_wikibio", files=["a.json", "b.json"], id=None)
    with pytest.raises(
        ConfigError,
        match=r"a\.json and .*b\.json \(\$EDITKIT_DATA\) do not exist; no hub dataset.*Fix: .*zjunlp/KnowEdit",
    ):
        dataset.load(0)
    (tmp_path / "b.json").write_text(json.dumps([biography()]))
    assert dataset.load(0).origin == str(tmp_path / "b.json")


def test_a_file_of_a_hub_repository_is_read_if_there_is_no_local_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("EDITKIT_DATA", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    dataset = construct_dataset("knowedit_wikibio")
    with pytest.raises(ConfigError, match="hub dataset zjunlp/KnowEdit cannot be read"):
        dataset.load(0)
    repository, commit = tmp_path / "datasets--zjunlp--KnowEdit", "0" * 40
    file = repository / "snapshots" / commit / "benchmark/WikiBio/wikibio-test-all.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps([biography()]))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = dataset.load(0)
    assert (len(loaded.requests), loaded.origin) == (
        1,
        "hub dataset zjunlp/KnowEdit, benchmark/WikiBio/wikibio-test-all.json",
    )
