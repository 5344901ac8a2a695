"""KnowEdit, MQuAKE and the commonsense sets: what each field becomes, and what of a record cannot
be used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from editkit.config.compose import conf_folder
from editkit.config.schema import Problems, construct
from editkit.datasets.base import AbstractDataset, LoadedDataset
from editkit.errors import ConfigError
from editkit.types import Probe


def construct_dataset(option: str, **changes: Any) -> AbstractDataset:
    """An option's dataset, with its file's own values but for the changes."""
    node = yaml.safe_load((conf_folder() / "dataset" / f"{option}.yaml").read_text())
    problems = Problems()
    dataset = construct(node | changes, "dataset", AbstractDataset, problems)
    if dataset is None:
        raise ConfigError(problems.messages)
    return dataset


def load(
    option: str, records: object, folder: Path, *, seed: int = 0, **changes: Any
) -> LoadedDataset:
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    return construct_dataset(option, path=str(path), **changes).load(seed)


def problems_of(option: str, records: object, folder: Path, **changes: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(option, records, folder, **changes)
    return [
        problem.removeprefix(f"{folder / 'records.json'}, ") for problem in caught.value.problems
    ]


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


def test_a_question_that_excludes_the_target_never_has_it_as_its_answer(tmp_path: Path) -> None:
    asked = "The country of Leo, which is not Syria, is"
    other = fact(
        prompt="The home of Leo is",
        locality={"Forgetfulness": [{"prompt": asked, "ground_truth": [["Syria", "SY"]]}]},
    )
    loaded = load("knowedit_wiki_recent", [fact(), other], tmp_path)
    assert loaded.requests[0].locality["forgetfulness"] == (
        Probe(prompt=asked, answer="USA", aliases=("US",)),
    )
    assert loaded.requests[1].locality == {}
    assert loaded.left_out == {
        "forgetfulness: the only answer is the target, which the question excludes": 1
    }


@pytest.mark.parametrize("truth", ["", [], [[]], [[], [" "]]])
def test_a_question_without_an_answer_is_left_out_and_counted_while_its_record_stays(
    truth: object, tmp_path: Path
) -> None:
    asked = [
        {"prompt": "The mother of Leo is", "ground_truth": truth},
        {"prompt": "The son of Leo is", "ground_truth": "Tom"},
    ]
    loaded = load(
        "knowedit_wiki_recent", [fact(locality={"Relation_Specificity": asked})], tmp_path
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
            "prompt: does not hold the subject - 'The country of Leo is' was given; the subject is 'Eve'",
        ),
        (
            fact(portability={"Alias": []}),
            "portability.Alias: is no known kind - allowed: Subject_Aliasing, Reasoning, Logical_Generalization",
        ),
        (
            fact(locality=["x"]),
            "locality: is not an object with fields but of type list - ['x'] was given",
        ),
        (
            fact(locality={"Forgetfulness": ["x"]}),
            "locality.Forgetfulness[0]: is not an object with fields but of type str - 'x' was given",
        ),
        (
            fact(locality={"Forgetfulness": [{"prompt": "", "ground_truth": "USA"}]}),
            "locality.Forgetfulness[0].prompt: is empty - '' was given; a text that is not blank is needed",
        ),
        (
            fact(portability={"Reasoning": [{"prompt": "x", "ground_truth": [["a"], [3]]}]}),
            "portability.Reasoning[0].ground_truth: holds a value of type int, not a text - 3 was given",
        ),
        (
            fact(portability={"Reasoning": [{"prompt": "x"}]}),
            "portability.Reasoning[0].ground_truth: is neither a text nor a list - None was given",
        ),
    ],
)
def test_what_is_wrong_with_a_record_of_knowedit_is_said_with_the_place_inside_it(
    record: object, problem: str, tmp_path: Path
) -> None:
    assert any(
        text.startswith(f"record 1: {problem}")
        for text in problems_of("knowedit_wiki_recent", [fact(), record], tmp_path)
    )


def test_a_chains_facts_are_a_group_whose_last_request_bears_the_questions_about_the_whole(
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


def test_questions_are_asked_in_the_given_form_and_the_results_say_so(tmp_path: Path) -> None:
    loaded = load("mquake", [chain()], tmp_path, question_format="Q: {} A:")
    assert loaded.requests[1].hops[0].prompt == "Q: Where is Ellie a citizen? A:"
    assert loaded.requests[0].paraphrases == ("Q: Where is Ellie a citizen? A:",)
    assert loaded.label == "mquake question_format=Q: {} A:"
    with pytest.raises(
        ConfigError, match=r'dataset\.question_format.*exactly one "\{\}" is needed'
    ):
        load("mquake", [chain()], tmp_path, question_format="Q:")


def test_chains_stay_together_and_whole_when_they_are_shuffled_or_limited(tmp_path: Path) -> None:
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
        "the first group holds 2 requests, and is not cut"
        in problems_of("mquake", records, tmp_path, limit=1)[0]
    )


def test_a_chain_through_a_fact_that_another_edits_otherwise_is_counted_or_left_out(
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


def test_a_statement_asks_for_a_judgement_after_a_colon(tmp_path: Path) -> None:
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
def test_a_statement_can_be_edited_at_its_verb_or_object_and_the_results_say_so(
    part: str, prompt: str, tmp_path: Path
) -> None:
    loaded = load("csk", [statement()], tmp_path, edit_at=part)
    assert (loaded.requests[0].prompt, loaded.label) == (prompt, f"csk edit_at={part}")


def test_plain_and_rewritten_statements_are_read_too(tmp_path: Path) -> None:
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
        "record 1: subject: is missing - no annotation was given; annotated files are svo_annotated/*: dataset.annot"
    )
    annotated = tmp_path / "annotated.json"
    annotated.write_text(json.dumps([plain | {"subject": "Dogs", "verb": "swim", "object": None}]))
    loaded = load("csk", records, tmp_path, annotations=[str(annotated)])
    assert [(each.full_prompt, each.target) for each in loaded.requests] == [
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
        and f"{label!r} was given; True, False, 1 and 0 are allowed" in problem
    )


def test_the_first_file_that_is_in_the_data_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITKIT_DATA", str(tmp_path))
    dataset = construct_dataset("knowedit_wikibio", files=["a.json", "b.json"], id=None)
    with pytest.raises(
        ConfigError,
        match=r"a\.json and .*b\.json \(\$EDITKIT_DATA\) do not exist; no hub dataset.*zjunlp/KnowEdit",
    ):
        dataset.load(0)
    (tmp_path / "b.json").write_text(json.dumps([biography()]))
    assert dataset.load(0).origin == str(tmp_path / "b.json")


def test_a_file_of_a_hub_repository_is_the_last_resort(
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
