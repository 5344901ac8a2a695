"""What stands between a prompt and its target: by the prompt's end, or as chosen."""

# ruff: noqa: RUF001 (letters of many scripts)

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.config.identity import config_hash
from editkit.config.parts import Parts
from editkit.datasets.base import AbstractDataset, loaded
from editkit.datasets.jsonl import JsonLines
from editkit.datasets.separators import (
    LINE_END,
    NO_BLANKS,
    OPENING,
    WITH_BLANK,
    between,
    joined,
    kind_of,
    kinds_of,
    lead_of,
    separated,
)
from editkit.errors import ConfigError
from editkit.evaluation.protocols.base import in_context
from editkit.runner.inputs import of_dataset
from editkit.types import EditRequest, Probe
from tests.support.chinese import REQUEST
from tests.support.helpers import real_data

ENDS = {
    WITH_BLANK: (
        *(
            "The capital of France is",
            "Ленин жил в",
            "한국의 수도는",
            "《기생충》의 감독은",
            "2+2=",
        ),
        *(
            "The capital of 法国 is",
            "Thủ đô là",
            "He said “no”",
            'The author of "Emma"',
            "the dogs'",
        ),
        *("Das Lied „Yesterday“", 'In "Hello,"', "", "x ", "法国的首都是 ", "ประเทศนี้คือ  ", "Ⅷ)"),
    ),
    NO_BLANKS: (
        *("法国的首都是", "法国的首都是：", "日本の首都は", "ラーメン", "ﾗｰﾒﾝ", "เมืองหลวงคือ"),
        *("ນະຄອນຫຼວງແມ່ນ", "រាជធានីគឺ", "မြို့တော်မှာ", "རྒྱལ་ས་ནི་", "𠀀", "他在1990", "答案（A）"),
    ),
    OPENING: ('He said "', "The code is (", "他说『", "said “", "— «", "(‘", 'x="'),
    LINE_END: ("Question: who?\nAnswer:\n", "a\t", "答：\u3000"),
}


@pytest.mark.parametrize(
    ("kind", "prompt"), [(kind, prompt) for kind, prompts in ENDS.items() for prompt in prompts]
)
def test_the_end_of_a_prompt_decides(kind: str, prompt: str) -> None:
    assert kind_of(Probe(prompt=prompt, answer="x")) == kind
    expected = (prompt.rstrip(" "), " " if kind == WITH_BLANK else "")
    assert between(prompt) == between(prompt, "auto") == expected


@pytest.mark.parametrize(
    ("prompt", "separator", "lead", "gap"),
    [
        ("法国的首都是", " ", "法国的首都是", " "),
        ("Paris is", "", "Paris is", ""),
        ("Paris is ", "", "Paris is", " "),  # the prompt's own blank
        ("Paris is ", " ", "Paris is", " "),
        ("Q", "\n", "Q\n", ""),
        ("Q ", " = ", "Q =", " "),
        ("Q", "\n  ", "Q\n", "  "),
    ],
)
def test_a_chosen_separator_is_divided_into_lead_and_gap(
    prompt: str, separator: str, lead: str, gap: str
) -> None:
    probe = Probe(prompt=prompt, answer="x", separator=separator)
    assert between(prompt, separator) == (lead, gap)
    assert lead_of(probe) == lead and joined(probe) == f"{lead}{gap}x"


def test_the_choice_reaches_every_prompt_of_a_request() -> None:
    assert separated(REQUEST, "auto") is REQUEST
    full = EditRequest(
        **{name: getattr(REQUEST, name) for name in ("id", "prompt", "subject", "target")},
        neighbours=REQUEST.neighbours,
        locality={"k": REQUEST.neighbours},
        portability={"k": REQUEST.neighbours},
        attribute_prompts=REQUEST.neighbours,
        hops=REQUEST.neighbours,
    )
    chosen = separated(full, "newline")
    assert chosen.probe().separator == chosen.probe(prompt="p", answer="a").separator == "\n"
    for probes in (
        *(chosen.neighbours, chosen.attribute_prompts, chosen.hops),
        *(chosen.locality["k"], chosen.portability["k"]),
    ):
        assert [probe.separator for probe in probes] == ["\n"]
    assert separated(chosen, " ") == chosen, "a request's own separator stays"


def test_a_context_ends_before_the_separator() -> None:
    asked = EditRequest(id="x", prompt="Q: {}? ", subject="a", target="b")
    assert in_context(asked, "So. {}").full_prompt == "So. Q: a? "
    assert in_context(asked, "{} A:").full_prompt == "Q: a? A:"
    assert in_context(REQUEST, "{}答:").prompt == "首都:{}答:"


def written(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "facts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


CHINESE = {
    "prompt": "法国的首都是",
    "subject": "法国",
    "target": "柏林",
    "paraphrases": ["法国首都"],
}
ENGLISH = {"prompt": "The capital of France is ", "subject": "France", "target": "Berlin"}


def read(path: str, **options: Any) -> Any:
    dataset = JsonLines(
        name="jsonl", path=path, order="file", limit=None, on_bad_record="error", **options
    )
    return loaded(dataset, 0)


def test_the_provenance_counts_the_choices(tmp_path: Path) -> None:
    path = written(tmp_path, CHINESE, ENGLISH, ENGLISH | {"separator": "newline"})
    data = read(path)
    assert data.provenance()["separators"] == {NO_BLANKS: 2, WITH_BLANK: 1, "'\\n', as chosen": 1}
    assert data.requests[1].prompt == "The capital of {} is ", "a prompt's end is kept"
    assert "separator" not in data.variant
    forced = read(path, separator=" ")
    assert forced.separators == {"' ', as chosen": 3, "'\\n', as chosen": 1}
    assert forced.label == "jsonl separator=' '"
    own = read(written(tmp_path, CHINESE | {"separator": "auto"}), separator=" ")
    assert own.separators == {NO_BLANKS: 2}


def test_a_resumed_run_must_find_the_same_choices(tmp_path: Path) -> None:
    blanks = read(written(tmp_path, ENGLISH)).provenance()
    none = read(written(tmp_path, CHINESE)).provenance()
    former = {name: value for name, value in blanks.items() if name != "separators"}
    assert of_dataset(blanks) == of_dataset(former) == {"dataset": blanks["digest"]}
    assert NO_BLANKS in of_dataset(none)["dataset.separators"]


@pytest.mark.parametrize("value", ["newlin", "Answer:", 3, ["\n"]])
def test_a_word_that_is_no_choice_is_refused(value: Any, tmp_path: Path) -> None:
    path = written(tmp_path, ENGLISH | {"separator": value})
    with pytest.raises(ConfigError, match=r"line 1: separator: is no separator \(got .*auto, newl"):
        read(path)
    if isinstance(value, str):
        with pytest.raises(ConfigError, match=r"^dataset\.separator: invalid value \(got "):
            read(written(tmp_path, ENGLISH), separator=value)


def test_the_options_change_a_runs_folder_and_their_defaults_do_not(tmp_path: Path) -> None:
    path = f"dataset.path={written(tmp_path, ENGLISH)}"

    def config(*overrides: str) -> Any:
        return compose(["dataset=jsonl", path, *overrides]).config

    plain = config()
    before = {key: value for key, value in plain.items() if key != "dataset"}
    before["dataset"] = {
        key: value
        for key, value in plain["dataset"].items()
        if key not in ("separator", "subject", "occurrence")
    }
    assert len(before["dataset"]) == len(plain["dataset"]) - 3
    assert config_hash(plain) == config_hash(before)
    for override, value in (
        ('dataset.separator=" "', " "),
        ("dataset.separator=", ""),
        ("dataset.separator=newline", "newline"),
    ):
        changed = config(override)
        assert changed["dataset"]["separator"] == value
        assert config_hash(changed) != config_hash(plain)


def test_a_chat_template_leaves_no_place_for_a_separator(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}")
    chosen = compose(
        [
            *("dataset=jsonl", "model=tiny-gpt2", "editor=ft", "suite=none", "edits=1"),
            f"dataset.path={written(tmp_path, ENGLISH | {'separator': ''})}",
            f"model.chat_template={tmp_path / 'chat.jinja'}",
        ]
    )
    with pytest.raises(ConfigError, match=r"dataset\.separator: the chat template, and nothing el"):
        build(chosen.config, choices=chosen.choices)


@pytest.mark.parametrize("option", ["world", "facts"])
def test_every_prompt_of_the_bundled_datasets_is_followed_by_a_blank(option: str) -> None:
    chosen = compose([f"dataset={option}", "dataset.limit=300"])
    parts = Parts(chosen.config, chosen.choices)
    dataset = parts.one("dataset", AbstractDataset)
    assert dataset is not None
    data = loaded(dataset, 0)
    assert set(kinds_of(data.requests)) == {WITH_BLANK}
    assert data.requests == dataset.load(0).requests


@pytest.mark.data
@pytest.mark.parametrize(
    ("option", "file"),
    [
        ("counterfact", "counterfact/counterfact_filtered.json"),
        ("zsre", "zsre/zsre_mend_eval_portability_gpt4.json"),
        ("mquake", "mquake/MQuAKE-CF_AKEW.json"),
    ],
)
def test_every_prompt_of_published_datasets_is_followed_by_a_blank(option: str, file: str) -> None:
    chosen = compose([f"dataset={option}", f"dataset.path={real_data(file)}"])
    dataset = Parts(chosen.config, chosen.choices).one("dataset", AbstractDataset)
    assert dataset is not None
    assert set(loaded(dataset, 0).separators) == {WITH_BLANK}
