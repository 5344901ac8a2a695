"""Targets that no generation can match exactly are named before a run; answers in scripts without
blanks are matched letter by letter.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.evaluation.editing import EditingEvaluator
from editkit.evaluation.protocols.generate import Generate
from editkit.evaluation.protocols.judge import Generated, StringJudge
from editkit.evaluation.protocols.matching import contains, is_match, place_of
from editkit.evaluation.unmatchable import unmatchable, warnings
from editkit.runner.session import RunWork, prepare
from tests.support.chinese import REQUEST
from tests.support.helpers import request, tiny_tokenizer


def test_line_breaks_and_long_targets_are_named_with_the_reason() -> None:
    tokenizer = tiny_tokenizer("gpt2")
    fits, breaks = replace(request(0), target="Paris"), replace(request(1), target="Paris\nRome")
    long = replace(request(2), target=" ".join(["Paris"] * 9))
    chosen = Generate(max_new_tokens=8)
    assert unmatchable(tokenizer, [fits, breaks, long], chosen) == {
        "test/1": "holds '\\n', which ends a generation",
        "test/2": "has 9 tokens",
    }
    assert unmatchable(tokenizer, [long], Generate(max_new_tokens=9)) == {}
    evaluator = EditingEvaluator(
        protocols=("generate",), tokens_per_batch=512, generate=Generate(max_new_tokens=8)
    )
    assert warnings(tokenizer, [fits, breaks, long], evaluator) == [
        "2 of 3 targets can never be generated exactly (evaluation.generate: at most 8 tokens): "
        "test/1 holds '\\n', which ends a generation; test/2 has 9 tokens"
    ]
    assert warnings(tokenizer, [fits], evaluator) == []
    assert warnings(tokenizer, [breaks], replace(evaluator, protocols=("argmax",))) == []


def test_letters_are_the_words_of_a_script_without_blanks() -> None:
    answer = REQUEST.target
    assert is_match("柏林\u3002", [answer]) and is_match(" 柏 林", [answer])
    assert not is_match("柏林市", [answer])
    assert contains("\u300c柏林\u300d是首都", [answer]) and not contains("柏和林", [answer])
    assert place_of("首都是 Berlin, 柏林", answer) == 4
    assert place_of("Berlin is 柏林", "Berlin") == 0, "other answers are matched as before"
    assert place_of("首都是Berlin", "Berlin") is None


@pytest.mark.parametrize(("text", "verdict"), [("柏林,不是巴黎", 1.0), ("巴黎,不是柏林", 0.0)])
def test_the_judge_reads_letters(text: str, verdict: float) -> None:
    asked = Generated(prompt="p", answers=("柏林",), text=text, old_answer="巴黎")
    assert StringJudge().judge([asked]) == [verdict]


def test_a_new_run_says_it_and_a_resumed_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "Paris is in", "subject": "Paris", "target": "a\\nb"}\n')
    chosen = compose(
        [
            *("dataset=jsonl", f"dataset.path={path}", "model=tiny-gpt2", "editor=ft", "edits=1"),
            *("suite=none", "evaluation.protocols=[generate]", f"paths.outputs={tmp_path}"),
        ]
    )
    experiment = build(chosen.config, choices=chosen.choices)
    trajectory = prepare(experiment, should_stop=lambda: False)
    said = [text for text in RunWork(experiment, trajectory).warnings() if "exactly" in text]
    assert len(said) == 1 and "jsonl/1 holds" in said[0]
    resumed = RunWork(experiment, replace(trajectory, contexts=None))
    assert not [text for text in resumed.warnings() if "exactly" in text]
