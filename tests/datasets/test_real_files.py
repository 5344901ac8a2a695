"""The published files are read completely: the number of requests, and the number of unusable parts
by reason.
"""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from editkit.config.compose import conf_folder
from editkit.config.schema import Problems, construct
from editkit.datasets.base import AbstractDataset, LoadedDataset
from editkit.errors import ConfigError
from tests.support.helpers import real_data

pytestmark = pytest.mark.data


def load(option: str, file: str, **changes: Any) -> LoadedDataset:
    """A real file, with the option's own values."""
    node = yaml.safe_load((conf_folder() / "dataset" / f"{option}.yaml").read_text())
    problems = Problems()
    dataset = construct(
        node | {"path": str(real_data(file))} | changes, "dataset", AbstractDataset, problems
    )
    assert dataset is not None, problems.messages
    return dataset.load(0)


def probes(loaded: LoadedDataset, part: str) -> dict[str, int]:
    """The number of probes by kind."""
    counts: dict[str, int] = {}
    for request in loaded.requests:
        for kind, of_kind in getattr(request, part).items():
            counts[kind] = counts.get(kind, 0) + len(of_kind)
    return counts


@pytest.mark.parametrize(
    ("file", "count"),
    [
        ("counterfact_filtered.json", 1400),
        ("counterfact-edit.json", 10000),
        ("counterfact-val.json", 1919),
    ],
)
def test_the_published_counterfact_files_are_read_completely(file: str, count: int) -> None:
    loaded = load("counterfact", f"counterfact/{file}")
    assert (len(loaded.requests), loaded.skipped, loaded.left_out) == (count, {}, {})
    assert all(
        request.neighbours and request.paraphrases and request.target_old
        for request in loaded.requests
    )


def test_every_prompt_kind_of_counterfacts_original_layout_is_there() -> None:
    for request in load("counterfact", "counterfact/counterfact_filtered.json").requests:
        kinds = (
            request.paraphrases,
            request.neighbours,
            request.attribute_prompts,
            request.generation_prompts,
        )
        assert [len(kind) for kind in kinds] == [2, 10, 10, 10]


def test_the_published_zsre_files_are_read_but_for_two_records_without_alternative() -> None:
    evaluation = load("zsre", "zsre/zsre_mend_eval_portability_gpt4.json")
    assert len(evaluation.requests) == 1037 and all(
        request.portability for request in evaluation.requests
    )
    assert evaluation.remarks == {"alt is one of the true answers": 29}
    path = "zsre/zsre_mend_train-1k.json"
    training = load("zsre", path, on_bad_record="skip")
    assert (len(training.requests), training.skipped) == (998, {"alt: is empty": 2})
    with pytest.raises(ConfigError) as caught:
        load("zsre", path)
    assert [
        ", record 534: alt" in text or ", record 723: alt" in text for text in caught.value.problems
    ] == [True, True]
    assert len(load("zsre", path, target="answers").requests) == 1000


@pytest.mark.parametrize(
    ("option", "file", "count", "left_out"),
    [
        (
            "wiki_recent",
            "wiki_recent/recent_train.json",
            570,
            {
                "forgetfulness: the only answer is the target, which the question excludes": 151,
                "relation_specificity: no answer": 7,
            },
        ),
        ("wiki_counterfact", "wiki_counterfact/test_839_from_results.json", 839, {}),
        (
            "wiki_counterfact",
            "wiki_counterfact/train_cf.json",
            1428,
            {"forgetfulness: no answer": 1, "relation_specificity: no answer": 1},
        ),
        ("zsre", "ZsRE/ZsRE-test-all.json", 1304, {}),
        ("zsre", "ZsRE/benchmark_ZsRE_ZsRE-test-all_seq.json", 1068, {}),
        ("wikibio", "WikiBio/wikibio-test-all.json", 306, {}),
        ("wikibio", "WikiBio/wikibio-train-all.json", 464, {}),
    ],
)
def test_no_record_of_knowedit_is_skipped_and_questions_without_an_answer_are_counted(
    option: str, file: str, count: int, left_out: dict[str, int]
) -> None:
    loaded = load(f"knowedit_{option}", f"knowedit/{file}")
    assert (len(loaded.requests), loaded.skipped, loaded.left_out) == (count, {}, left_out)


def test_knowedits_kinds_of_questions_are_all_there() -> None:
    recent = load("knowedit_wiki_recent", "knowedit/wiki_recent/recent_train.json")
    assert probes(recent, "portability") == {
        "alias": 52,
        "reasoning": 476,
        "logical_generalization": 223,
    }
    assert probes(recent, "locality") == {
        "relation_specificity": 1648 - 7,
        "forgetfulness": 298 - 151,
    }
    questions = load("knowedit_zsre", "knowedit/ZsRE/ZsRE-test-all.json")
    assert probes(questions, "portability") == {
        "alias": 264,
        "reasoning": 771,
        "logical_generalization": 269,
    }
    assert questions.remarks["the target is one of the true answers"] == 43


def test_mquakes_chains_are_read_completely_and_its_contradicted_chains_are_counted() -> None:
    file, chains = (
        "mquake/MQuAKE-CF_AKEW.json",
        "chains through a fact that another chain edits otherwise",
    )
    loaded = load("mquake", file)
    assert (len(loaded.requests), len({request.group for request in loaded.requests})) == (436, 354)
    assert (
        probes(loaded, "portability"),
        sum(len(request.hops) for request in loaded.requests),
    ) == ({"multi_hop": 3 * 354}, 1000)
    assert (loaded.skipped, loaded.remarks[chains]) == ({}, 61)
    without = load("mquake", file, contradicted_chains="leave_out")
    assert (len({request.group for request in without.requests}), without.left_out) == (
        354 - 61,
        {chains: 61},
    )


@pytest.mark.parametrize(
    ("file", "count", "missing"),
    [
        ("20q/probe_set", 379, 0),
        ("20q/incorrect_subsets/probe_set", 379, 0),
        ("20q/incorrect_subsets/gpt2-xl/edit_subset", 603, 0),
        ("20q/incorrect_subsets/gpt2-xl/edit_validation_subset", 127, 0),
        ("20q/incorrect_subsets/gpt2-large/edit_subset", 140, 0),  # plain statements from here on
        ("20q/incorrect_subsets/gpt2-large/edit_validation_subset", 649, 5),
        ("20q/edit_validation_set", 507, 0),
        ("20q/edit_set", 2505, 23),
        ("20q/svo_annotated/edit_set", 2505, 23),
        ("20q/svo_annotated/edit_validation_set", 507, 0),
        ("pep3k/probe_set", 265, 0),
        ("pep3k/incorrect_subsets/probe_set", 265, 0),
        ("pep3k/incorrect_subsets/gpt2-xl/edit_subset", 70, 0),
        ("pep3k/incorrect_subsets/gpt2-xl/edit_validation_subset", 360, 0),
        ("pep3k/incorrect_subsets/gpt2-large/edit_subset", 364, 0),
        ("pep3k/incorrect_subsets/gpt2-large/edit_validation_subset", 76, 0),
        ("pep3k/edit_validation_set", 306, 0),
        ("pep3k/edit_set", 1531, 2),
        ("pep3k/svo_annotated/edit_set", 1531, 2),
        ("pep3k/svo_annotated/edit_validation_set", 306, 0),
    ],
)
def test_commonsense_statements_are_read_but_for_those_whose_annotation_has_no_subject(
    file: str, count: int, missing: int
) -> None:
    part = file.partition("/")[0]
    annotations = [
        str(real_data(f"csk/{part}/svo_annotated/{name}.json"))
        for name in ("edit_set", "edit_validation_set")
    ]
    loaded = load(
        "csk", f"csk/{file}.json", set=part, annotations=annotations, on_bad_record="skip"
    )
    assert (len(loaded.requests), loaded.skipped) == (
        count - missing,
        {"subject: is missing": missing} if missing else {},
    )


@pytest.mark.parametrize(("part", "count"), [("20q", 2006), ("pep3k", 1225)])
def test_the_commonsense_training_sets_have_no_annotation_and_cannot_be_edited(
    part: str, count: int
) -> None:
    with pytest.raises(ConfigError, match=r"subject: is missing \(got no annotation\)") as caught:
        load("csk", f"csk/{part}/train_set.json", set=part, on_bad_record="skip")
    assert f"most frequent: subject: is missing ({count} records)" in caught.value.problems[-1]
