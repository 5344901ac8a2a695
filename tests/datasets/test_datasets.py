"""Datasets: what a record becomes, what is refused and how it is said, and that the order follows
from the seed.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from editkit.datasets.base import AbstractDataset
from editkit.datasets.bundled import WorldDataset
from editkit.datasets.counterfact import CounterFact
from editkit.datasets.fields import Fields
from editkit.datasets.zsre import ZsRE
from editkit.errors import ConfigError


def original(case_id: int = 0, **changes: Any) -> dict[str, Any]:
    rewrite = {
        "prompt": "The mother tongue of {} is",
        "subject": "Ada",
        "target_new": {"str": "French", "id": "Q1"},
        "target_true": {"str": "Latin", "id": "Q2"},
    }
    record = {
        "case_id": case_id,
        "paraphrase_prompts": ["x. Ada speaks"],
        "neighborhood_prompts": ["Bob speaks", "Cy speaks"],
    }
    more = {
        "attribute_prompts": ["Flo speaks"],
        "generation_prompts": ["Ada was born in", "Ada was born in"],
    }
    return {**record, **more, "requested_rewrite": {"relation_id": "P103"} | rewrite | changes}


def flat(case_id: int = 0, **changes: Any) -> dict[str, Any]:
    record = {
        "case_id": case_id,
        "prompt": "The mother tongue of Ada is",
        "subject": "Ada",
        "target_new": "French",
        "ground_truth": "Latin",
        "rephrase_prompt": "Ada speaks",
        "locality_prompt": "Bob speaks",
        "locality_ground_truth": "Greek",
    }
    return record | changes


def question(**changes: Any) -> dict[str, Any]:
    record = {
        "subject": "UniFirst",
        "src": "What is made by UniFirst?",
        "pred": "uniform",
        "alt": " planes",
        "answers": ["uniform", "uniforms"],
        "rephrase": "What does UniFirst make?",
        "loc": "nq question: who wrote it",
        "loc_ans": "Walter",
        "portability": {
            "Recalled Relation": "-",
            "New Question": "Where do the makers of UniFirst's product work?",
            "New Answer": "sky",
        },
    }
    return record | changes


def write(folder: Path, content: object) -> str:
    path = folder / "records.json"
    path.write_text(json.dumps(content) if not isinstance(content, str) else content)
    return str(path)


def counterfact(path: str | None, **options: Any) -> CounterFact:
    source = {
        "name": "counterfact",
        "path": path,
        "file": "counterfact/x.json",
        "id": None,
        "snippets": None,
    }
    return CounterFact(
        **(source | {"order": "file", "limit": None, "on_bad_record": "error"} | options)
    )


def zsre(path: str | None, **options: Any) -> ZsRE:
    defaults = {
        "name": "zsre",
        "file": "zsre/x.json",
        "id": None,
        "target": "alt",
        "order": "file",
        "limit": None,
        "on_bad_record": "error",
    }
    return ZsRE(**({"path": path} | defaults | options))


def at(path: str, index: int, problem: str) -> str:
    """The pattern of a problem's beginning."""
    return rf"{re.escape(path)}, record {index}( \(id \w+\))?: {re.escape(problem)}"


def problems_of(dataset: AbstractDataset) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        dataset.load(0)
    return caught.value.problems


def test_both_counterfact_layouts_are_told_apart_by_their_keys(tmp_path: Path) -> None:
    first, second = counterfact(write(tmp_path, [original(3), flat(5)])).load(0).requests
    assert (first.id, first.prompt, first.full_prompt) == (
        "counterfact/3",
        "The mother tongue of {} is",
        "The mother tongue of Ada is",
    )
    assert (first.target, first.target_old, first.paraphrases) == (
        "French",
        "Latin",
        ("x. Ada speaks",),
    )
    assert [(probe.prompt, probe.answer) for probe in first.neighbours] == [
        ("Bob speaks", "Latin"),
        ("Cy speaks", "Latin"),
    ]
    assert (second.id, second.prompt, second.target, second.target_old) == (
        "counterfact/5",
        first.prompt,
        "French",
        "Latin",
    )
    assert (second.paraphrases, second.neighbours[0].answer) == (("Ada speaks",), "Greek")


def test_counterfacts_further_prompts_ask_for_the_new_target_elsewhere_and_begin_texts(
    tmp_path: Path,
) -> None:
    first, second = counterfact(write(tmp_path, [original(3), flat(5)])).load(0).requests
    assert [(probe.prompt, probe.answer) for probe in first.attribute_prompts] == [
        ("Flo speaks", "French")
    ]
    assert first.generation_prompts == (
        "Ada was born in",
        "Ada was born in",
    )  # as often as the file has them
    assert (second.attribute_prompts, second.generation_prompts, second.references) == ((), (), ())


def test_reference_texts_come_from_their_own_file_by_relation_and_target(tmp_path: Path) -> None:
    snippets = tmp_path / "snippets.json"
    samples = [
        {
            "relation_id": "P103",
            "target_id": "Q1",
            "samples": [{"text": "French is spoken."}, {"text": "Paris."}],
        },
        {"relation_id": "P103", "target_id": "Q9", "samples": [{"text": "no"}]},
    ]
    snippets.write_text(json.dumps(samples))
    loaded = counterfact(write(tmp_path, [original(3), flat(5)]), snippets=str(snippets)).load(0)
    assert [request.references for request in loaded.requests] == [
        ("French is spoken.", "Paris."),
        (),
    ]
    assert loaded.variant == {"snippets": hashlib.sha256(snippets.read_bytes()).hexdigest()[:12]}
    snippets.write_text(json.dumps([{"relation_id": "P103", "samples": [{}]}]))
    problems = problems_of(counterfact(write(tmp_path, [original()]), snippets=str(snippets)))
    assert [problem.removeprefix(f"{snippets}, record 0: ") for problem in problems] == [
        "target_id: is missing - a text is needed",
        "samples[0].text: is missing - a text is needed",
    ]


def test_what_was_given_and_what_is_allowed_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, [flat(4, subject="Eve", target_new=" ")])
    assert [
        problem.removeprefix(f"{path}, record 0 (id 4): ")
        for problem in problems_of(counterfact(path))
    ] == [
        "prompt: does not hold the subject - 'The mother tongue of Ada is' was given; the subject is 'Eve'",
        "target_new: is empty - ' ' was given; a text that is not blank is needed",
    ]


def test_requests_that_overwrite_each_other_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [flat(0), flat(1), flat(2, target_new="Greek"), flat(3, subject="is", target_new="Greek")],
    )
    assert counterfact(path).load(0).remarks == {
        "requests that edit the prompt of an earlier one again, to the same target": 2,
        "requests that edit the prompt of an earlier one again, to another target": 1,
    }


@pytest.mark.parametrize(
    ("prompt", "subject", "template"),
    [
        (
            "Adam met Ada in Ada",
            "Ada",
            "Adam met {} in Ada",
        ),  # the first whole match; other occurrences stay as they are
        ("Is C++ (1985) fast?", "C++ (1985)", "Is {} fast?"),  # no pattern
        ("{a} and } of Ada", "Ada", "{a} and } of {}"),  # single braces are text
        ("東京都の首都", "東京", "{}都の首都"),  # no blanks between words
        ("Ada's home", "Ada", "{}'s home"),
    ],
)
def test_the_subject_becomes_the_slot_and_the_filled_prompt_is_the_one_of_the_file(
    prompt: str, subject: str, template: str, tmp_path: Path
) -> None:
    (request,) = (
        counterfact(write(tmp_path, [flat(prompt=prompt, subject=subject)])).load(0).requests
    )
    assert request.prompt == template
    assert request.full_prompt == prompt


def test_zsre_writes_the_alternative_or_the_true_answer(tmp_path: Path) -> None:
    path = write(tmp_path, [question(), question(alt="uniform", portability=None)])
    first, second = zsre(path).load(0).requests
    assert (first.id, first.prompt, first.target, first.target_old) == (
        "zsre/0",
        "What is made by {}?",
        "planes",
        "uniform",
    )
    assert first.paraphrases == ("What does UniFirst make?",)
    (unrelated,) = first.locality["out_of_distribution"]
    assert (unrelated.prompt, unrelated.answer, first.neighbours) == (
        "nq question: who wrote it?",
        "Walter",
        (),
    )
    assert first.portability["one_hop"][0].answer == "sky"
    assert (second.target_old, second.portability) == ("uniforms", {})
    corrected = zsre(path, target="answers").load(0).requests[0]
    # What follows from the alternative does not follow from the true answer.
    assert (corrected.target, corrected.target_old, corrected.portability) == ("uniform", None, {})
    # The results name the variant, since the two are not comparable.
    assert (zsre(path).load(0).label, zsre(path, target="answers").load(0).variant) == (
        "zsre target=alt",
        {"target": "answers"},
    )
    assert zsre(path).load(0).remarks["alt is one of the true answers"] == 1


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (flat(subject="Eve"), "prompt: does not hold the subject"),
        (flat(target_new=" "), "target_new: is empty"),
        (flat(target_new=7), "target_new: is not a text but of type int"),
        (flat(target_new="Latin"), "target_new: is the same as the true target: nothing to edit"),
        (flat(prompt="Ada {} is"), 'prompt: holds "{}", which marks the subject'),
        (flat(subject="{}", prompt="a {} b"), 'prompt: holds "{}", which marks the subject'),
        (flat(subject=""), "subject: is empty"),
        (flat(rephrase_prompt=""), "rephrase_prompt: is empty"),
        (flat(target_new="\ud800"), "target_new: is not valid Unicode"),
        (original(prompt="no slot"), 'requested_rewrite.prompt: does not hold exactly one "{}"'),
        (original(prompt="{} and {}"), 'requested_rewrite.prompt: does not hold exactly one "{}"'),
        (original(target_new={"str": ""}), "requested_rewrite.target_new.str: is empty"),
        (original() | {"neighborhood_prompts": ["a", ""]}, "neighborhood_prompts[1]: is empty"),
        (
            original() | {"neighborhood_prompts": "a"},
            "neighborhood_prompts: is not a list but of type str",
        ),
        (
            {"question": "?"},
            "record: has neither requested_rewrite (original layout) nor prompt (flat layout)",
        ),
        ("text", "record: is not an object with fields but of type str"),
    ],
)
def test_a_bad_record_is_named_with_file_record_and_field(
    record: object, problem: str, tmp_path: Path
) -> None:
    path = write(tmp_path, [flat(), record])
    assert any(re.match(at(path, 1, problem), text) for text in problems_of(counterfact(path)))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"alt": ""}, "alt: is empty"),
        ({"answers": []}, "answers: is empty"),
        ({"loc": None}, "loc: is missing"),
    ],
)
def test_a_bad_question_is_named_with_its_field(
    change: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    path = write(tmp_path, [question(), question(**change)])
    assert any(re.match(at(path, 1, problem), text) for text in problems_of(zsre(path)))


def test_all_problems_are_reported_at_once_and_long_lists_are_cut(tmp_path: Path) -> None:
    few = problems_of(
        counterfact(
            write(
                tmp_path,
                [flat(0, subject="Eve", target_new=""), flat(1, ground_truth=None), flat(2)],
            )
        )
    )
    assert len(few) == 3
    assert "dataset.on_bad_record=skip leaves such records out and keeps 1" in few[-1]
    many = problems_of(
        counterfact(write(tmp_path, [flat(index, target_new="") for index in range(50)]))
    )
    assert len(many) == 21
    assert "30 more problems; most frequent: target_new: is empty (50 records)" in many[-1]


def test_bad_records_can_be_skipped_and_each_is_counted_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [
            flat(0),
            flat(1, target_new="", subject="Eve"),
            flat(2, target_new=""),
            flat(0, target_new="Greek"),
        ],
    )
    loaded = counterfact(path, on_bad_record="skip").load(0)
    assert [request.id for request in loaded.requests] == ["counterfact/0"]
    assert loaded.skipped == {
        "prompt: does not hold the subject": 1,
        "target_new: is empty": 1,
        "id: is not unique": 1,
    }


def test_equal_ids_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, [flat(7), flat(7)])
    assert (
        "record 1 (id 7): id: is not unique - counterfact/7 was given; it is the id of record 0 too"
        in problems_of(counterfact(path))[0]
    )


def test_a_file_without_a_good_record_is_an_error_even_when_bad_ones_are_skipped(
    tmp_path: Path,
) -> None:
    assert "holds no records" in problems_of(counterfact(write(tmp_path, [])))[0]
    assert (
        "target_new: is empty"
        in problems_of(counterfact(write(tmp_path, [flat(target_new="")]), on_bad_record="skip"))[0]
    )


def test_malformed_json_is_named_with_line_and_column(tmp_path: Path) -> None:
    path = write(tmp_path, '[\n {"case_id": 1,,}\n]')
    assert problems_of(counterfact(path))[0].startswith(
        f"{path}, line 2, column 16: malformed JSON"
    )
    assert "a JSON list of records is needed" in problems_of(counterfact(write(tmp_path, "{}")))[0]
    (tmp_path / "latin.json").write_bytes(b'["caf\xe9"]')
    assert "byte 5 is not UTF-8" in problems_of(counterfact(str(tmp_path / "latin.json")))[0]


def test_a_missing_file_and_a_folder_are_errors_that_say_what_was_given(tmp_path: Path) -> None:
    assert problems_of(counterfact(str(tmp_path / "none.json")))[0].startswith(
        f"dataset.path: {tmp_path / 'none.json'} does not exist"
    )
    write(tmp_path, [])
    assert (
        "is a folder - give one JSON file; it holds: records.json"
        in problems_of(counterfact(str(tmp_path)))[0]
    )


def test_the_data_folder_is_used_when_no_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITKIT_DATA", str(tmp_path))
    assert (
        f"{tmp_path / 'counterfact/x.json'} ($EDITKIT_DATA) does not exist"
        in problems_of(counterfact(None))[0]
    )
    (tmp_path / "counterfact").mkdir()
    (tmp_path / "counterfact/x.json").write_text(json.dumps([flat()]))
    assert counterfact(None).load(0).origin == str(tmp_path / "counterfact/x.json")
    path = write(tmp_path, [flat(), flat(1)])
    assert len(counterfact(path).load(0).requests) == 2  # an explicit path comes first


def test_without_any_source_the_error_says_where_it_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDITKIT_DATA", raising=False)
    problem = problems_of(zsre(None))[0]
    assert all(
        part in problem
        for part in (
            "dataset.path is null",
            "$EDITKIT_DATA is not set",
            "dataset.id is null",
            "zsre_mend_eval.json",
        )
    )


def test_the_digest_is_that_of_the_files_bytes(tmp_path: Path) -> None:
    path = write(tmp_path, [flat()])
    assert counterfact(path).load(0).digest == hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_the_order_is_the_files_or_follows_from_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path, [flat(index) for index in range(30)])
    in_file = [request.id for request in counterfact(path).load(1).requests]
    assert in_file == [f"counterfact/{index}" for index in range(30)]
    shuffled = [
        [request.id for request in counterfact(path, order="shuffled").load(seed).requests]
        for seed in (1, 1, 2)
    ]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(shuffled[0]) == sorted(in_file) and shuffled[0] != in_file
    assert [
        request.id for request in counterfact(path, order="shuffled", limit=5).load(1).requests
    ] == shuffled[0][:5]
    assert "dataset.limit: 0" in problems_of(counterfact(path, limit=0))[0]


def test_the_world_needs_no_file_and_its_requests_have_counterfacts_shape() -> None:
    dataset = WorldDataset(name="world", world_seed=0, order="file", limit=None)
    loaded = dataset.load(0)
    assert loaded == dataset.load(1)
    assert len({request.id for request in loaded.requests}) == len(loaded.requests) >= 1000
    for request in loaded.requests:
        assert (
            request.prompt.count("{}") == 1
            and request.target
            and request.target != request.target_old
        )
        assert len(request.paraphrases) >= 2 and len(request.neighbours) >= 5
    assert (
        loaded.digest
        != WorldDataset(name="world", world_seed=1, order="file", limit=None).load(0).digest
    )


def test_records_are_checked_without_torch(tmp_path: Path) -> None:
    path = write(tmp_path, [flat()])
    program = (
        "import sys; from editkit.datasets.counterfact import CounterFact; import editkit.datasets.zsre, editkit.datasets.bundled;"
        f"CounterFact(name='c', path={path!r}, file='', id=None, snippets=None, order='file', limit=None, on_bad_record='error').load(0);"
        "sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_fields_note_the_first_problem_of_each_field_only() -> None:
    fields = Fields({"a": 1})
    fields.text("a")
    fields.note("a", "again")
    assert [str(problem) for problem in fields.problems] == [
        "a: is not a text but of type int - 1 was given"
    ]


@pytest.mark.slow
def test_a_hub_dataset_is_the_last_resort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.delenv("EDITKIT_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub", [original(4)])
    loaded = counterfact(None, id=str(tmp_path / "hub")).load(0)
    assert [request.id for request in loaded.requests] == ["counterfact/4"]
    problem = problems_of(counterfact(None, id=str(tmp_path / "missing")))[0]
    assert f"hub dataset {tmp_path / 'missing'} cannot be read" in problem
