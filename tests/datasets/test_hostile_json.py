"""Every reader of JSON says in one message what is wrong, in which line and which field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from editkit.datasets.counterfact import read_snippets
from editkit.datasets.csk import CommonSense, read_annotations
from editkit.datasets.jsonl import JsonLines
from editkit.datasets.knowedit import KnowEdit
from editkit.datasets.mquake import MQuAKE
from editkit.datasets.strict_json import BadJson, parse
from editkit.datasets.ultraeditbench import UltraEditBench
from editkit.errors import ConfigError
from editkit.evaluation.tasks.data import read_file
from editkit.files import read_object
from editkit.model.architecture import facts_without_download
from editkit.records.foreign import load_foreign
from tests.support.counterfact_files import counterfact, flat, original, question, zsre

COMMON: dict[str, Any] = {"order": "file", "limit": None, "on_bad_record": "error", "id": None}
MQUAKE = {
    "requested_rewrite": [
        {
            "prompt": "{} is in",
            "subject": "Ada",
            "target_new": {"str": "Rome"},
            "target_true": {"str": "Bonn"},
        }
    ],
    "questions": ["Where?"],
    "new_answer": "Rome",
    "new_single_hops": [{"question": "Where?", "answer": "Rome"}],
}
ULTRA = {
    "prompt": "Where is Ada?",
    "subject": "Ada",
    "rephrase_prompt": "x",
    "ans": "Rome",
    "loc": "y",
    "loc_ans": "z",
}
CSK = {"prompt": "Ada eats", "subject": "Ada", "verb": "eats", "object": "x", "label": "True"}


def knowedit(path: str) -> Any:
    return KnowEdit(name="k", path=path, files=(), hub_file=None, **COMMON).load(0)


def mquake(path: str) -> Any:
    options = {"question_format": "{}", "contradicted_chains": "keep"}
    return MQuAKE(name="m", path=path, file="", **COMMON, **options).load(0)  # type: ignore[arg-type]


def csk(path: str) -> Any:
    return CommonSense(
        name="c", set="20q", edit_at="subject", path=path, file="", annotations=(), **COMMON
    ).load(0)


def ultraeditbench(path: str) -> Any:
    return UltraEditBench(name="u", path=path, files=(), **COMMON).load(0)


def jsonl(path: str) -> Any:
    own = {name: value for name, value in COMMON.items() if name != "id"}
    return JsonLines(name="j", path=path, **own).load(0)


# name -> reader, a good record, and whether the file has a record in each line
READERS: dict[str, tuple[Callable[[str], Any], dict[str, Any], bool]] = {
    "counterfact": (lambda path: counterfact(path).load(0), original(), False),
    "counterfact, flat": (lambda path: counterfact(path).load(0), flat(), False),
    "snippets": (
        read_snippets,
        {"relation_id": "P1", "target_id": "Q1", "samples": [{"text": "x"}]},
        False,
    ),
    "zsre": (lambda path: zsre(path).load(0), question(), False),
    "knowedit": (knowedit, {"subject": "Ada", "prompt": "Ada is", "target_new": "x"}, False),
    "mquake": (mquake, MQUAKE, False),
    "csk": (csk, CSK, False),
    "ultraeditbench": (ultraeditbench, ULTRA, False),
    "ultraeditbench, lines": (ultraeditbench, ULTRA, True),
    "annotations": (lambda path: read_annotations([path]), CSK, False),
    "jsonl": (jsonl, {"prompt": "Ada is", "subject": "Ada", "target": "x"}, True),
    "task": (lambda path: read_file(Path(path)), {"question": "q"}, False),
    "task, lines": (lambda path: read_file(Path(path)), {"question": "q"}, True),
}
DEEP = "[" * 100_000 + "]" * 100_000
# name -> the value of a further field in the second line, and the problem
VALUES: dict[str, tuple[str, str]] = {
    "duplicate": ('{"a": 1, "b": 2, "a": 3}', "the key stands twice in one object, field .*more.a"),
    "digits": ("1" * 5_000, "a number of 5000 digits, field .*more"),
    "negative digits": ("-" + "1" * 5_000, "a number of 5000 digits, field .*more"),
    "nesting": (DEEP, r"more than 100 lists and objects inside one another, field .*more\[0\]"),
    "malformed": ("[1,,2]", r"Expecting value, .*more\[1\]"),
    "NUL byte": ('"a\0b"', "NUL bytes, as UTF-16 and damaged files have them, field .*more"),
    "latin-1": ('"caf\xe9"', "byte \\d+ is not UTF-8, field .*more"),
}


def content(record: dict[str, Any], value: str, *, in_lines: bool) -> str:
    """A good record, then one in a line of its own with the further field, at its end."""
    good = json.dumps(record)
    bad = f'{good[:-1]}, "more": {value}}}'
    return f"{good}\n{bad}\n" if in_lines else f"[{good},\n{bad}\n]"


def save(folder: Path, data: bytes, *, in_lines: bool) -> str:
    path = folder / ("file.jsonl" if in_lines else "file.json")
    path.write_bytes(data)
    return str(path)


def problem_of(read: Callable[[str], Any], path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(path)
    (problem,) = caught.value.problems
    assert path in problem and len(problem) < 600
    return problem


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("reader", READERS)
def test_one_message_names_file_line_and_field(reader: str, value: str, tmp_path: Path) -> None:
    read, record, in_lines = READERS[reader]
    text, expected = VALUES[value]
    encoding = "latin-1" if value == "latin-1" else "utf-8"
    data = content(record, text, in_lines=in_lines).encode(encoding)
    problem = problem_of(read, save(tmp_path, data, in_lines=in_lines))
    assert "line 2" in problem
    assert re.search(expected, problem), problem


@pytest.mark.parametrize("value", VALUES)
def test_results_of_other_programs_are_read_the_same_way(value: str, tmp_path: Path) -> None:
    text, expected = VALUES[value]
    encoding = "latin-1" if value == "latin-1" else "utf-8"
    data = content({"case_id": 1}, text, in_lines=False).encode(encoding)
    path = save(tmp_path, data, in_lines=False)
    problem = problem_of(lambda path: load_foreign(Path(path)), path)
    assert "line 2" in problem and re.search(expected, problem), problem


@pytest.mark.parametrize("reader", READERS)
def test_a_byte_order_mark_is_read_and_utf_16_is_refused(reader: str, tmp_path: Path) -> None:
    read, record, in_lines = READERS[reader]
    text = json.dumps(record) + "\n" if in_lines else json.dumps([record])
    for encoding in ("utf-8", "utf-8-sig"):
        read(save(tmp_path, text.encode(encoding), in_lines=in_lines))
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        path = save(tmp_path, text.encode(encoding), in_lines=in_lines)
        assert "the text is UTF-16" in problem_of(read, path)


# By reader, the lists and texts of its records.
FIELDS = {
    "counterfact": ("paraphrase_prompts", "neighborhood_prompts"),
    "counterfact, flat": ("prompt", "subject", "target_new", "ground_truth"),
    "snippets": ("relation_id", "target_id", "samples"),
    "zsre": ("subject", "src", "alt", "answers", "rephrase", "loc", "loc_ans"),
    "knowedit": ("prompt", "target_new"),
    "mquake": ("requested_rewrite", "questions", "new_answer", "new_single_hops"),
    "csk": ("prompt", "subject", "label"),
    "ultraeditbench": tuple(ULTRA),
    "jsonl": ("prompt", "subject", "target"),
}
# Those that may be missing or null, and must be lists otherwise.
OPTIONAL = {
    "counterfact": ("attribute_prompts", "generation_prompts"),
    "csk": ("affected_paraphrase", "affected_reasoning", "unaffected_neighborhood_subject"),
    "jsonl": ("paraphrases", "neighbours", "generation_prompts", "references", "hops"),
}


@pytest.mark.parametrize(
    ("reader", "name"), [(reader, name) for reader, names in FIELDS.items() for name in names]
)
@pytest.mark.parametrize("value", [None, [None], {"a": None}, 7])
def test_null_and_other_types_are_named_with_their_field(
    reader: str, name: str, value: Any, tmp_path: Path
) -> None:
    read, record, in_lines = READERS[reader]
    lines = [json.dumps(record), json.dumps(record | {name: value, "case_id": 1, "id": "b"})]
    if reader in ("snippets", "zsre", "knowedit", "mquake", "csk", "ultraeditbench"):
        lines = [json.dumps(each) for each in (record, record | {name: value})]
    text = "\n".join(lines) if in_lines else f"[{','.join(lines)}]"
    with pytest.raises(ConfigError) as caught:
        read(save(tmp_path, text.encode(), in_lines=in_lines))
    place = "line 2" if in_lines else "record 1"
    assert any(place in problem and name in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("reader", "name"), [(reader, name) for reader, names in OPTIONAL.items() for name in names]
)
def test_an_optional_list_may_be_null_and_its_entries_may_not(
    reader: str, name: str, tmp_path: Path
) -> None:
    read, record, in_lines = READERS[reader]

    def path(value: Any) -> str:
        text = json.dumps(record | {name: value})
        return save(tmp_path, (text if in_lines else f"[{text}]").encode(), in_lines=in_lines)

    read(path(None))
    for value in ([None], "text", {"a": 1}):
        with pytest.raises(ConfigError) as caught:
            read(path(value))
        assert all(name in problem for problem in caught.value.problems)


def test_a_nul_character_in_a_text_is_a_problem_of_its_field(tmp_path: Path) -> None:
    record = {"prompt": "Ada is", "subject": "Ada", "target": "a\0b"}
    path = save(tmp_path, json.dumps(record).encode(), in_lines=True)
    assert "line 1: target: holds a NUL character (got 'a\\x00b')" in problem_of(jsonl, path)


@pytest.mark.parametrize("text", [DEEP, "1" * 5_000, '{"a": ' * 5_000, "\0", "\xff", "[]", "null"])
def test_own_files_and_configurations_of_models_are_not_read_then(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert read_object(tmp_path / "config.json") == {}
    if text not in ("[]", "null"):
        assert facts_without_download("x", str(tmp_path)) is None


def test_the_place_is_found_in_a_text_of_any_shape() -> None:
    text = '{"a\\"b": [{"c": {}, "d": [1, {"e": [true, null, {"f": 1,\n "f": 2}]}]}]}'
    with pytest.raises(BadJson) as caught:
        parse(text.encode())
    assert str(caught.value) == (
        'line 2, column 2: the key stands twice in one object, field a"b[0].d[1].e[2]...'
    )
    assert parse(b'{"a": [1, -2, 1.5, "x", {"b": null}]}') == {"a": [1, -2, 1.5, "x", {"b": None}]}
