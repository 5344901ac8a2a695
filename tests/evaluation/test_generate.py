"""The protocol `generate`: matching, the judge, and greedy decoding that stops where it should."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.evaluation.protocols.base import Answers, Questions
from editkit.evaluation.protocols.generate import Generate
from editkit.evaluation.protocols.judge import AbstractJudge, Generated, StringJudge
from editkit.evaluation.protocols.matching import contains, is_match, normalise
from editkit.evaluation.scoring.frozen_text import from_bytes, to_bytes
from editkit.evaluation.scoring.greedy import continue_greedily
from editkit.evaluation.statistics.subsets import everything
from editkit.evaluation.statistics.tally import Statistics
from editkit.model.generate import generate_texts
from editkit.types import EditRequest
from tests.support.bigram import Bigram
from tests.support.helpers import KINDS, Kind, tiny_model
from tests.support.measurements import REQUEST


def answers_of(request: EditRequest, *texts: str) -> Answers:
    prompts = dict.fromkeys(Generate().prompts(Questions(request, with_attributes=False)))
    return Answers({}, dict(zip(prompts, texts, strict=True)))


def values(
    protocol: Generate, request: EditRequest, now: Answers, before: Answers
) -> dict[tuple[str, str | None], float | None]:
    questions = Questions(request, with_attributes=False)
    verdicts = protocol.assess([questions], now, [protocol.freeze(questions, before)])
    return {
        (each.metric.name, each.metric.task): each.estimate.value
        for each in everything(verdicts.judged, Statistics())
    }


def test_matching_is_squads() -> None:
    assert normalise("  The  Big-Apple, a town!") == "bigapple town"
    assert is_match("the New York.", ["new york"]) and not is_match("New York City", ["New York"])
    assert contains("It is in New York, USA", ["Rome", "new york"]) and not contains(
        "the party", ["art"]
    )
    assert contains("", []) is False and contains("", ["Rome"]) is False
    assert not is_match("", ["Rome"]) and not is_match("x", ["!"]) and is_match("!", ["!"])
    assert not contains("anything", ["the"]), "an article alone is nowhere after normalisation"


def test_generate_tells_exact_match_containment_and_the_judges_verdict_apart() -> None:
    before = answers_of(REQUEST, "Paris.", "Paris", "Paris", "rome, of course")
    now = answers_of(REQUEST, "the New York", "New York, not Paris", "NYC", "Rome of course!")
    found = values(Generate(), REQUEST, now, before)
    assert (
        found["efficacy", None],
        found["efficacy_contains", None],
        found["efficacy_judged", None],
    ) == (1.0, 1.0, 1.0)
    assert (
        found["generalization", None],
        found["generalization_contains", None],
        found["generalization_judged", None],
    ) == (0.0, 1.0, 1.0)
    assert (found["portability", None], found["portability_contains", None]) == (1.0, 1.0), (
        "an alias is right"
    )
    assert found["locality", None] == 1.0, "the same but for punctuation and case"
    other = values(
        Generate(), REQUEST, answers_of(REQUEST, "", "Paris, not New York", "Rome", ""), before
    )
    assert (
        other["efficacy", None],
        other["efficacy_contains", None],
        other["efficacy_judged", None],
    ) == (0.0, 0.0, 0.0), "an empty one"
    assert (other["generalization_contains", None], other["generalization_judged", None]) == (
        1.0,
        0.0,
    ), "the old answer comes first"
    assert (other["portability", None], other["locality", None]) == (0.0, 0.0)


def test_every_generation_is_kept_with_what_was_expected() -> None:
    now = answers_of(REQUEST, "New York", "x", "NYC", "Rome")
    questions = Questions(REQUEST, with_attributes=False)
    rows = (
        Generate()
        .assess(
            [questions],
            now,
            [Generate().freeze(questions, answers_of(REQUEST, "a", "b", "c", "Rome"))],
        )
        .rows
    )
    assert [(row["metric"], row["generation"]) for row in rows] == [
        ("efficacy", "New York"),
        ("generalization", "x"),
        ("portability", "NYC"),
        ("locality", "Rome"),
    ]
    assert (
        rows[2]["answers"] == ["New York", "NYC", "the Big Apple"] and rows[3]["unedited"] == "Rome"
    )
    assert rows[0] | {"efficacy": 1.0, "efficacy_contains": 1.0, "efficacy_judged": 1.0} == rows[0]


def test_the_string_judge_wants_the_answer_early_and_before_the_old_one() -> None:
    def verdict(text: str, old: str | None = "Rome", **options: int) -> float:
        return StringJudge(**options).judge(
            [Generated(prompt="p", answers=("Paris",), text=text, old_answer=old)]
        )[0]

    assert verdict("Paris, the capital of France") == 1.0
    assert verdict("Rome, not Paris") == 0.0 and verdict("Rome, not Paris", old=None) == 1.0
    assert verdict("well it may be that it is in Paris", words=3) == 0.0
    assert StringJudge().judge(
        [
            Generated(
                prompt="p", answers=("New York City",), text="New York City", old_answer="New York"
            )
        ]
    ) == [1.0]


@dataclass(frozen=True, kw_only=True)
class Unsure(AbstractJudge):
    """Gives half marks, and no verdict on what is empty; notes what it was asked."""

    seen: list[Generated]

    def judge(self, generated: Sequence[Generated]) -> list[float]:
        self.seen.extend(generated)
        return [0.5 if each.text else math.nan for each in generated]


def test_a_judge_of_ones_own_is_asked_everything_at_once_and_no_verdict_is_a_failure() -> None:
    judge = Unsure(seen=[])
    before = answers_of(REQUEST, "", "", "", "")
    found = values(Generate(judge=judge), REQUEST, answers_of(REQUEST, "x", "", "y", ""), before)
    assert (found["efficacy_judged", None], found["generalization_judged", None]) == (0.5, 0.0)
    assert [(each.text, each.old_answer) for each in judge.seen] == [
        ("x", "Paris"),
        ("", "Paris"),
        ("y", None),
    ]
    assert "efficacy_judged" not in {
        name for name, _ in values(Generate(judge=None), REQUEST, before, before)
    }
    with pytest.raises(ConfigError, match=r"max_new_tokens: out of range \(got 0"):
        Generate(max_new_tokens=0)


def test_generation_stops_at_a_newline_or_the_cap_and_runs_each_prompt_once() -> None:
    model: Any = Bigram(bos=True)
    model.say("Apple is", "Paris", 0.9)
    model.say("is Paris", "French", 0.8)
    model.say("is French", "French", 0.8)
    found = continue_greedily(
        model, ["Apple is", "Apple is", "Rome is "], max_new_tokens=4, tokens_per_batch=40
    )
    assert found == {
        "Apple is": "Paris French French French",
        "Rome is ": "Paris French French French",
    }
    newline = model.tokenizer("\n")["input_ids"][-1]
    model.logits_VV[model.tokenizer(" French")["input_ids"][-1], newline] = 9.0
    assert continue_greedily(model, ["Apple is"], max_new_tokens=4, tokens_per_batch=40) == {
        "Apple is": "Paris French"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_continuations_do_not_depend_on_the_batch(kind: Kind) -> None:
    model = tiny_model(kind)
    prompts = ["Apple is in", "The mother tongue of Léon Blum is", "Paris", "x " * 200 + "is"]
    together = continue_greedily(model, prompts, max_new_tokens=6, tokens_per_batch=4096)
    assert together == continue_greedily(model, prompts, max_new_tokens=6, tokens_per_batch=1)
    plain = generate_texts(model, prompts[:3], max_new_tokens=6)
    assert [together[prompt] for prompt in prompts[:3]] == [
        text.partition("\n")[0].strip() for text in plain
    ]


def test_generation_batches_are_halved_when_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    prompts = [f"{index} is" for index in range(9)]
    expected = continue_greedily(model, prompts, max_new_tokens=3, tokens_per_batch=1000)
    base = model.module(model.family.base)
    forward, rows = base.forward, []

    def small(*args: Any, **arguments: Any) -> Any:
        rows.append(len(arguments["input_ids"]))
        if rows[-1] > 4:
            raise torch.OutOfMemoryError("too large")
        return forward(*args, **arguments)

    monkeypatch.setattr(base, "forward", small)
    assert continue_greedily(model, prompts, max_new_tokens=3, tokens_per_batch=60) == expected
    assert max(rows) > 4 and max(rows[rows.index(max(rows)) + 1 :]) <= 9
    monkeypatch.setattr(
        base,
        "forward",
        lambda *args, **arguments: (_ for _ in ()).throw(torch.OutOfMemoryError("never")),
    )
    with pytest.raises(torch.OutOfMemoryError):
        continue_greedily(model, prompts, max_new_tokens=3, tokens_per_batch=60)


def test_texts_survive_as_tensors() -> None:
    value = ["", "Léon\n日本", "\ud83d half a character"]
    assert from_bytes(to_bytes(value)) == value
