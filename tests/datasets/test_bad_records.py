"""Bad records are refused with file, record and field, or skipped and counted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from editkit.datasets.fields import Fields
from tests.support.counterfact_files import (
    counterfact,
    flat,
    original,
    problems_of,
    question,
    write,
    zsre,
)


def at(path: str, index: int, problem: str) -> str:
    """The pattern of a problem's beginning."""
    return rf"{re.escape(path)}, record {index}( \(id \w+\))?: {re.escape(problem)}"


def test_a_problem_names_the_given_and_the_expected_value(tmp_path: Path) -> None:
    path = write(tmp_path, [flat(4, subject="Eve", target_new=" ")])
    assert [
        problem.removeprefix(f"{path}, record 0 (id 4): ")
        for problem in problems_of(counterfact(path))
    ] == [
        "prompt: does not hold the subject (got 'The mother tongue of Ada is'; expected a prompt with the subject 'Eve').",
        "target_new: is empty (got ' '; expected a text that is not blank).",
    ]


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


def test_all_problems_are_reported_together_and_long_lists_are_shortened(tmp_path: Path) -> None:
    few = problems_of(
        counterfact(
            write(
                tmp_path,
                [flat(0, subject="Eve", target_new=""), flat(1, ground_truth=None), flat(2)],
            )
        )
    )
    assert len(few) == 3
    assert "set dataset.on_bad_record=skip, which leaves such records out and keeps 1" in few[-1]
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
        "record 1 (id 7): id: is not unique (got counterfact/7; expected an id other than that of record 0)."
        in problems_of(counterfact(path))[0]
    )


def test_a_file_without_a_good_record_is_an_error_even_when_bad_ones_are_skipped(
    tmp_path: Path,
) -> None:
    assert "the file has no records" in problems_of(counterfact(write(tmp_path, [])))[0]
    assert (
        "target_new: is empty"
        in problems_of(counterfact(write(tmp_path, [flat(target_new="")]), on_bad_record="skip"))[0]
    )


def test_malformed_json_is_named_with_line_and_column(tmp_path: Path) -> None:
    path = write(tmp_path, '[\n {"case_id": 1,,}\n]')
    assert problems_of(counterfact(path))[0].startswith(
        f"{path}, line 2, column 16: malformed JSON"
    )
    assert "expected a JSON list of records" in problems_of(counterfact(write(tmp_path, "{}")))[0]
    (tmp_path / "latin.json").write_bytes(b'["caf\xe9"]')
    assert "byte 5 is not UTF-8" in problems_of(counterfact(str(tmp_path / "latin.json")))[0]


def test_fields_keep_the_first_problem_of_each_field() -> None:
    fields = Fields({"a": 1})
    fields.text("a")
    fields.note("a", "again")
    assert [problem.at("x") for problem in fields.problems] == [
        "x: a: is not a text but of type int (got 1)."
    ]
