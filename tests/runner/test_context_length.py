"""Requests that do not fit into a model's positions are refused before anything is computed, all of
them by name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.errors import ConfigError
from editkit.model.editable import EditableModel
from editkit.model.tokens import encode, encode_with_target
from editkit.runner.context_length import require_room
from editkit.runner.session import prepare
from editkit.types import EditRequest, Probe
from tests.support.helpers import request, tiny_model
from tests.support.memories import ICE

BARE = ("{}",)


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return tiny_model("gpt2")  # 128 positions


def filled(model: EditableModel, *, tokens: int) -> EditRequest:
    """A request whose prompt and target have so many tokens without the last."""
    plain = request(0)
    for count in range(1, 200):
        made = dataclasses.replace(plain, prompt=f"{plain.prompt} {'7' * count}")
        if (
            len(encode_with_target(model.tokenizer, made.full_prompt, made.target).ids) - 1
            == tokens
        ):
            return made
    raise AssertionError("no such prompt")


def problems(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str] = BARE,
    questions: Any = None,
) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        require_room(model, requests, contexts, questions or [()] * len(requests))
    return list(raised.value.problems)


def test_a_request_may_fill_every_position_and_no_more(model: EditableModel) -> None:
    fits, spills = (
        filled(model, tokens=128),
        dataclasses.replace(filled(model, tokens=129), id="spills"),
    )
    require_room(model, [fits], BARE, [()])
    (problem,) = problems(model, [fits, spills])
    assert problem.startswith(
        "spills: prompt and target, without the last token, are too long (got 129; expected at "
        "most 128 tokens, the context length of tiny-gpt2)."
    )


def test_every_request_that_is_too_long_is_named_also_in_a_context(model: EditableModel) -> None:
    context = "Once upon a time. {}"
    room = 128 - len(encode(model.tokenizer, ["Once upon a time."])[0].ids)
    near = [
        dataclasses.replace(filled(model, tokens=tokens), id=f"r/{tokens}")
        for tokens in (room - 5, room + 5, 128)
    ]
    require_room(model, near, BARE, [()] * 3)
    refused = problems(model, near, ("{}", context))
    assert [problem.partition(":")[0] for problem in refused] == [f"r/{room + 5}", "r/128"]
    assert (
        all("in the editor's longest context template" in problem for problem in refused)
        and "Fix: leave such requests out" in refused[-1]
    )


def test_an_answer_without_room_is_named_with_its_question(model: EditableModel) -> None:
    long = Probe(prompt="Who was it?", answer="Rome " * 200)
    fine = Probe(
        prompt="Paris is in " * 200, answer="France"
    )  # a question that only judges loses its beginning
    (problem,) = problems(model, [request(0), request(1)], questions=[[fine], [fine, long, long]])
    assert (
        problem.startswith(f"{request(1).id}: the answer 'Rome Rome")
        and "to 'Who was it?' is too long" in problem
    )


def test_a_run_refuses_them_before_second_moments_are_taken(tmp_path: Path) -> None:
    records = [
        {
            "id": name,
            "prompt": f"{'word ' * size}{{}} lives in",
            "subject": "Ann",
            "target": "Rome",
            "target_old": "Oslo",
        }
        for name, size in (("short", 1), ("long", 400), ("longer", 500))
    ]
    records[0]["neighbours"] = [{"prompt": "Bob lives in", "answer": "a " * 1200}]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, records)))
    dataset = ["dataset=jsonl", f"dataset.path={tmp_path}/mine.jsonl", "edits=3"]
    composed = compose(
        ["tracker=none", "suite=none", "editor=rome", f"stats.folder={tmp_path}/stats", *dataset]
    )
    with pytest.raises(ConfigError) as raised:
        prepare(build(composed.config, choices=composed.choices), should_stop=lambda: False)
    named = [problem.partition(": ") for problem in raised.value.problems]
    assert [name.rpartition("/")[2] for name, _, _ in named] == ["long", "longer", "short"]
    assert "the answer 'a a a" in named[2][2] and not (tmp_path / "stats").exists()


def test_a_context_that_leaves_no_room_for_a_prompt_is_refused_with_the_requests_by_name(
    model: EditableModel,
) -> None:
    asked = [request(0), request(1)]
    editor = dataclasses.replace(ICE, demonstrations=3)
    before = editor.context_tokens(model, asked, [request(index) for index in range(3)])
    questions = [[each.probe()] for each in asked]
    with pytest.raises(ConfigError) as raised:
        require_room(model, asked, BARE, questions, before=before)
    text = str(raised.value)
    assert text.startswith(f"2 problems:\n  - test/0: with {before} tokens of texts before it, ")
    assert "Fix: set editor.demonstrations or editor.facts lower, leave such requests out" in text
    bare = ICE.context_tokens(model, asked, ())
    require_room(model, asked, BARE, questions, before=bare)
    texts = [each.full_prompt for each in asked]
    read = [
        f"New Fact: {each.full_prompt} {each.target}\nPrompt: {each.full_prompt}" for each in asked
    ]
    lengths = [len(encoded.ids) for encoded in encode(model.tokenizer, [*texts, *read])]
    added = max(lengths[2] - lengths[0], lengths[3] - lengths[1])
    assert added <= bare <= added + 3, "up to the tokens at the seams"
