"""The requests of MQuAKE chains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editkit.config.compose import compose
from editkit.config.schema import Problems, construct
from editkit.datasets.base import AbstractDataset
from editkit.errors import ConfigError
from tests.support.datasets import load, problems_of


def chain(case_id: int = 1, **changes: Any) -> dict[str, Any]:
    record = {
        "case_id": case_id,
        "requested_rewrite": [
            {
                "prompt": "{} is a citizen of",
                "subject": "Ellie",
                "target_new": {"str": "Croatia"},
                "target_true": {"str": "USA"},
                "question": "Where is Ellie a citizen?",
            },
            {
                "prompt": "The capital of {} is",
                "subject": "Croatia",
                "target_new": {"str": "Split"},
                "target_true": {"str": "Zagreb"},
            },
        ],
        "questions": [
            "What is the capital of Ellie's country?",
            "Which city rules it?",
            "Where is its seat?",
        ],
        "answer": "Washington",
        "new_answer": "Split",
        "new_answer_alias": ["Spalato", "Split", "Spalato"],
        "new_single_hops": [
            {
                "question": "Where is Ellie a citizen?",
                "cloze": "",
                "answer": "Croatia",
                "answer_alias": ["Hrvatska"],
            },
            {
                "question": "What is the capital of Croatia?",
                "cloze": "",
                "answer": "Split",
                "answer_alias": [],
            },
        ],
        "orig": {
            "edit_triples": [["Q1", "P27", "Q2"]],
            "new_triples": [["Q1", "P27", "Q2"], ["Q2", "P36", "Q3"]],
        },
    }
    return record | changes


def test_the_last_request_of_a_chain_has_the_questions_about_the_whole_chain(
    tmp_path: Path,
) -> None:
    first, last = load("mquake", [chain()], tmp_path).requests
    assert (first.id, last.id, first.group, last.group) == (
        "mquake/1/0",
        "mquake/1/1",
        "mquake/1",
        "mquake/1",
    )
    assert (first.full_prompt, first.target, first.target_old) == (
        "Ellie is a citizen of",
        "Croatia",
        "USA",
    )
    assert (first.paraphrases, last.paraphrases) == (("Where is Ellie a citizen?",), ())
    assert (first.portability, first.hops) == ({}, ())
    assert [probe.prompt for probe in last.portability["multi_hop"]] == chain()["questions"]
    assert {(probe.answer, probe.aliases) for probe in last.portability["multi_hop"]} == {
        ("Split", ("Spalato",))
    }
    assert [(hop.prompt, hop.answer, hop.aliases) for hop in last.hops] == [
        ("Where is Ellie a citizen?", "Croatia", ("Hrvatska",)),
        ("What is the capital of Croatia?", "Split", ()),
    ]


@pytest.mark.parametrize("option", ["mquake_cf_3k_v2", "mquake_t"])
def test_the_further_files_have_the_same_layout(option: str, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([chain(answer_extended=["Washington", "DC"])]))
    node = compose([f"dataset={option}", f"dataset.path={path}"]).config["dataset"]
    dataset = construct(node, "dataset", AbstractDataset, Problems())
    assert dataset is not None
    requests = dataset.load(0).requests
    assert [request.id for request in requests] == [f"{option}/1/0", f"{option}/1/1"]
    assert requests[1].portability["multi_hop"][0].answer == "Split"


def test_questions_have_the_configured_format_and_results_name_it(tmp_path: Path) -> None:
    loaded = load("mquake", [chain()], tmp_path, question_format="Q: {} A:")
    assert loaded.requests[1].hops[0].prompt == "Q: Where is Ellie a citizen? A:"
    assert loaded.requests[0].paraphrases == ("Q: Where is Ellie a citizen? A:",)
    assert loaded.label == "mquake question_format=Q: {} A:"
    with pytest.raises(
        ConfigError, match=r'^dataset\.question_format: .*got .Q:.; expected exactly one "\{\}"'
    ):
        load("mquake", [chain()], tmp_path, question_format="Q:")


def test_shuffled_or_limited_chains_stay_together_and_complete(tmp_path: Path) -> None:
    records = [chain(index) for index in range(20)]
    loaded = load("mquake", records, tmp_path, seed=3, order="shuffled")
    groups = [str(request.group) for request in loaded.requests]
    assert groups[::2] == groups[1::2] and len(set(groups)) == 20 and groups != sorted(groups)
    assert [request.id[-1] for request in loaded.requests] == ["0", "1"] * 20
    assert [request.id for request in load("mquake", records, tmp_path, limit=3).requests] == [
        "mquake/0/0",
        "mquake/0/1",
    ]
    assert (
        "group of requests, which must stay complete (got 1; expected at least 2)"
        in problems_of("mquake", records, tmp_path, limit=1)[0]
    )


def test_contradicted_chains_are_counted_or_left_out(
    tmp_path: Path,
) -> None:
    other = chain(
        2, orig={"edit_triples": [["Q2", "P36", "Q9"]], "new_triples": [["Q2", "P36", "Q9"]]}
    )
    chains = "chains through a fact that another chain edits otherwise"
    loaded = load("mquake", [chain(), other], tmp_path)
    assert (len(loaded.requests), loaded.remarks[chains], loaded.left_out) == (4, 1, {})
    loaded = load("mquake", [chain(), other], tmp_path, contradicted_chains="leave_out")
    assert ({request.group for request in loaded.requests}, loaded.left_out) == (
        {"mquake/2"},
        {chains: 1},
    )


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"requested_rewrite": []}, "requested_rewrite: is empty"),
        (
            {"requested_rewrite": [{"subject": "a", "prompt": "b"}]},
            'requested_rewrite[0].prompt: does not hold exactly one "{}"',
        ),
        ({"new_answer": None}, "new_answer: is missing"),
        ({"questions": ["a", ""]}, "questions[1]: is empty"),
        ({"new_single_hops": [{"question": "a"}]}, "new_single_hops[0].answer: is missing"),
    ],
)
def test_a_bad_chain_is_skipped_as_a_whole(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    records = [chain(1), chain(2, **changes)]
    assert any(
        text.startswith(f"record 1 (id 2): {problem}")
        for text in problems_of("mquake", records, tmp_path)
    )
    loaded = load("mquake", records, tmp_path, on_bad_record="skip")
    assert ({request.group for request in loaded.requests}, sum(loaded.skipped.values())) == (
        {"mquake/1"},
        1,
    )
