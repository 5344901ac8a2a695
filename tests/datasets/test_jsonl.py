"""editkit's own format: every field is read, and all bad records are reported together, with the
given and the expected values.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from editkit.datasets.base import OnBadRecord, Order
from editkit.datasets.jsonl import JsonLines
from editkit.errors import ConfigError
from editkit.types import EditRequest, Probe

FULL: dict[str, Any] = {
    "id": "capital-1",
    "prompt": "The capital of {} is",
    "subject": "France",
    "target": "Lyon",
    "target_old": "Paris",
    "paraphrases": ["France's capital is"],
    "neighbours": [{"prompt": "The capital of Italy is", "answer": "Rome"}],
    "locality": {
        "out_of_distribution": [
            {"prompt": "Who wrote Faust?", "answer": "Goethe", "aliases": ["Johann Goethe"]}
        ]
    },
    "portability": {
        "reasoning": [{"prompt": "The river of France's capital is the", "answer": "Rhône"}]
    },
    "attribute_prompts": [{"prompt": "The second city of France is", "answer": "Lyon"}],
    "generation_prompts": ["France is ruled from"],
    "references": ["Lyon lies where two rivers meet."],
    "group": "france",
    "hops": [{"prompt": "What is France's capital?", "answer": "Lyon"}],
    "separator": None,
    "occurrence": "first",
}
SMALL = {"prompt": "The capital of Spain is", "subject": "Spain", "target": "Seville"}


def dataset(
    path: str,
    *,
    order: Order = "file",
    limit: int | None = None,
    on_bad_record: OnBadRecord = "error",
) -> JsonLines:
    return JsonLines(name="jsonl", path=path, order=order, limit=limit, on_bad_record=on_bad_record)


def write(folder: Path, *lines: object) -> str:
    path = folder / "requests.jsonl"
    path.write_text(
        "".join(
            f"{line if isinstance(line, str) else json.dumps(line, ensure_ascii=False)}\n"
            for line in lines
        )
    )
    return str(path)


def problems_of(path: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        dataset(path).load(0)
    return [problem.removeprefix(f"{path}, ") for problem in caught.value.problems]


def test_every_field_is_read_and_only_three_are_required(tmp_path: Path) -> None:
    full, small = dataset(write(tmp_path, FULL, "", SMALL)).load(0).requests
    assert full == EditRequest(
        id="jsonl/capital-1",
        prompt="The capital of {} is",
        subject="France",
        target="Lyon",
        target_old="Paris",
        paraphrases=("France's capital is",),
        neighbours=(Probe(prompt="The capital of Italy is", answer="Rome"),),
        locality={
            "out_of_distribution": (
                Probe(prompt="Who wrote Faust?", answer="Goethe", aliases=("Johann Goethe",)),
            )
        },
        portability={
            "reasoning": (Probe(prompt="The river of France's capital is the", answer="Rhône"),)
        },
        attribute_prompts=(Probe(prompt="The second city of France is", answer="Lyon"),),
        generation_prompts=("France is ruled from",),
        references=("Lyon lies where two rivers meet.",),
        group="france",
        hops=(Probe(prompt="What is France's capital?", answer="Lyon"),),
    )
    # Without an id a record is named by its number. A full prompt is equivalent to a template.
    assert small == EditRequest(
        id="jsonl/2", prompt="The capital of {} is", subject="Spain", target="Seville"
    )


def test_the_format_has_a_field_for_everything_that_a_request_holds() -> None:
    assert set(FULL) == {*EditRequest.__dataclass_fields__, "occurrence"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"targt": "x"},
            "targt: is not a field of this format (expected one of id, prompt, subject,",
        ),
        ({"target": None}, "target: is missing (expected a text)."),
        ({"target": 3}, "target: is not a text but of type int (got 3)."),
        (
            {"target": "Paris"},
            "target: is the same as target_old: nothing to edit (got 'Paris').",
        ),
        (
            {"prompt": "The capital is"},
            "prompt: does not hold the subject (got 'The capital is'; expected a prompt with the "
            "subject 'France').",
        ),
        (
            {"prompt": "{} and {}"},
            "prompt: does not hold exactly one \"{}\" for the subject (got '{} and {}').",
        ),
        ({"id": 1.5}, "id: is neither a text nor a whole number (got 1.5)."),
        ({"paraphrases": "x"}, "paraphrases: is not a list but of type str (got 'x')."),
        (
            {"paraphrases": ["x", " "]},
            "paraphrases[1]: is empty (got ' '; expected a text that is not blank).",
        ),
        ({"neighbours": [{"prompt": "x"}]}, "neighbours[0].answer: is missing (expected a text)."),
        (
            {"neighbours": [{"prompt": "x", "answer": "y", "alias": []}]},
            "neighbours[0].alias: is not a field of this format (expected one of prompt, answer, "
            "aliases). Fix: did you mean aliases?",
        ),
        (
            {"locality": []},
            "locality: is not an object with fields but of type list (got []).",
        ),
        (
            {"locality": {"Out of": []}},
            "locality.Out of: is no name of a kind (expected lower-case letters, digits and _).",
        ),
        (
            {"portability": {"alias": [{"prompt": 1, "answer": "y"}]}},
            "portability.alias[0].prompt: is not a text but of type int",
        ),
    ],
)
def test_a_bad_field_is_named_with_line_id_and_what_is_allowed(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    (actual,) = problems_of(write(tmp_path, SMALL, "", FULL | changes))
    assert re.match(r"line 3( \(id capital-1\))?: " + re.escape(problem), actual), actual
    if changes.get("targt"):
        assert "Fix: did you mean target?" in actual


def test_all_bad_records_are_reported_together_also_lines_that_are_not_json(tmp_path: Path) -> None:
    path = write(
        tmp_path, "{not json", *[SMALL | {"target": ""} for _ in range(40)], "[1]", '"text"', SMALL
    )
    problems = problems_of(path)
    assert len(problems) == 43
    assert (
        problems[0]
        == "line 1: record: is not JSON: Expecting property name enclosed in double quotes, "
        "column 2."
    )
    assert problems[40].startswith("line 41: target: is empty")
    assert "line 42: record: is not an object with fields but of type list (got [1])." in problems
    assert (
        "set dataset.on_bad_record=skip, which leaves such records out and keeps 1 requests"
        in problems[-1]
    )
    loaded = dataset(path, on_bad_record="skip").load(0)
    assert ([request.id for request in loaded.requests], sum(loaded.skipped.values())) == (
        ["jsonl/44"],
        43,
    )
    assert loaded.skipped["record: is not JSON"] == 1


def test_a_group_with_a_bad_record_is_left_out_as_a_whole(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        *[
            SMALL | {"group": group, "target": target}
            for group, target in [("a", "x"), ("a", ""), ("b", "y")]
        ],
    )
    loaded = dataset(path, on_bad_record="skip").load(0)
    assert [request.group for request in loaded.requests] == ["b"]
    assert loaded.skipped == {"target: is empty": 1, "group: another record of it is bad": 1}


def test_the_records_of_a_group_must_follow_each_other(tmp_path: Path) -> None:
    (problem,) = problems_of(
        write(tmp_path, *[SMALL | {"group": group} for group in ("a", "b", "a")])
    )
    assert problem.startswith(
        "line 3: group: is interrupted (got 'a'; expected consecutive records for each group)"
    )


def test_validate_reports_all_problems_of_a_file_and_describes_a_good_file(
    tmp_path: Path,
) -> None:
    def validate(path: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "editkit",
            "validate",
            "dataset=jsonl",
            f"dataset.path={path}",
            "edits=1",
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    bad = validate(write(tmp_path, *[SMALL | {"target": ""} for _ in range(30)]))
    assert bad.returncode == 2
    assert bad.stderr.count("target: is empty") == 30
    good = validate(write(tmp_path, SMALL, SMALL))
    assert good.returncode == 0, good.stderr
    assert (
        "jsonl, 2 requests from" in good.stdout
        and "1 x requests that edit the prompt of an earlier one again" in good.stdout
    )
