"""The requests of HalluEditBench's tables."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from editkit.errors import ConfigError
from editkit.types import Probe
from tests.support.datasets import construct_dataset, load, problems_of

HOPS = {
    f"{part}_{hops}hop": f"{part} {hops}" for hops in range(2, 7) for part in ("question", "answer")
}


def row(**changes: str) -> dict[str, str]:
    return {
        "topic": "business_brand",
        "subject": "Norwood",
        "relation": "country",
        "object": "Wold",
        "question": "What is the country of Norwood?",
        "output_llama": "Norwood is no country",
        "eval_llama": "0.0",
        "multiple_choices": "['Wold', \"Fell's\"]",
        "paraphrased_question": "Which country, if any, has Norwood?",
        "multiple_choice_with_letters": "A. Wold  B. Fell's",
        "multiple_choice_labels": "A",
        "yes_question": "Is Wold the country of Norwood?",
        "no_question": "Is Norwood no country?",
        "locality_question": "What does Norwood make?",
        "reversed_relation_question": "Which firm is in Wold?",
    } | HOPS | changes  # fmt: skip


def table(*rows: dict[str, str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def test_a_row_is_a_request_with_eleven_kinds_of_questions(tmp_path: Path) -> None:
    (request,) = load("hallueditbench", table(row()), tmp_path).requests
    assert (request.prompt, request.subject, request.target, request.target_old) == (
        "What is the country of {}?",
        "Norwood",
        "Wold",
        "Norwood is no country",
    )
    assert request.paraphrases == ("Which country, if any, has Norwood?",)
    assert request.locality == {
        "relation_specificity": (Probe(prompt="What does Norwood make?", answer="Wold"),)
    }
    asked = {kind: (probe.prompt, probe.answer) for kind, (probe,) in request.portability.items()}
    assert asked == {
        "yes": ("Is Wold the country of Norwood?", "Yes"),
        "no": ("Is Norwood no country?", "No"),
        "multiple_choice": ("What is the country of Norwood? A. Wold  B. Fell's", "A"),
        "reversed": ("Which firm is in Wold?", "Norwood"),
        "two_hop": ("question 2", "answer 2"),
        "three_hop": ("question 3", "answer 3"),
        "four_hop": ("question 4", "answer 4"),
        "five_hop": ("question 5", "answer 5"),
        "six_hop": ("question 6", "answer 6"),
    }


def test_empty_cells_are_no_questions_and_a_question_without_answer_is_left_out(
    tmp_path: Path,
) -> None:
    record = row(
        question_2hop="", answer_2hop="", answer_3hop="", output_llama="Wold", locality_question=" "
    )
    loaded = load("hallueditbench", table(record), tmp_path)
    (request,) = loaded.requests
    assert not {"two_hop", "three_hop"} & set(request.portability)
    assert (request.locality, request.target_old) == ({}, None)
    assert loaded.left_out == {"three_hop: no answer": 1}


def test_a_folder_holds_the_topics_of_a_model(tmp_path: Path) -> None:
    for name in ("human_writer", "art_sculpture"):
        text = table(row(topic=name, subject=name, question=f"Where is {name}?"))
        (tmp_path / f"{name}.csv").write_text(text)
    loaded = construct_dataset("hallueditbench", path=str(tmp_path)).load(0)
    assert [request.subject for request in loaded.requests] == ["art_sculpture", "human_writer"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (table(row(), row(object="")), "line 3: object: is empty"),
        (table(row(), row(subject="Sutton")), "line 3: question: does not hold the subject"),
        (table(row()) + "a,b\n", "line 3: record: has no value for each column: 2 instead of 25"),
        (table(row() | {"question": "a\nb"}, row(object="")), "line 4: object: is empty"),
        (table({"a": "1"}), "line 2: question: is missing (expected a text)"),
    ],
)
def test_a_problem_names_its_line_and_column(text: str, problem: str, tmp_path: Path) -> None:
    problems = problems_of("hallueditbench", text, tmp_path)
    assert any(each.startswith(problem) for each in problems), problems


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a,a\n1,2\n", "line 1: the columns have no or equal names (got 'a, a'"),
        (b"", "line 1: the columns have no or equal names"),
        (b"a,b\n1,\xff\n", "byte 6 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_table_is_refused(content: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "records.csv"
    path.write_bytes(content)
    dataset: Any = construct_dataset("hallueditbench", path=str(path))
    with pytest.raises(ConfigError) as caught:
        dataset.load(0)
    assert problem in caught.value.problems[0]
