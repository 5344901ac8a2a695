"""A fact in a script without blanks: the edit writes what a generation then says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from editkit.datasets.separators import separated
from editkit.evaluation.editing import EditingEvaluator
from editkit.evaluation.protocols.generate import Generate
from editkit.hypernet.examples import Example
from editkit.hypernet.losses import by_row, losses
from editkit.model.editable import EditableModel
from editkit.model.generate import generate_texts
from editkit.types import EditRequest
from tests.editors.test_ft import ft
from tests.editors.test_rome import rome
from tests.support.chinese import REQUEST, chinese_model
from tests.support.methods import memit, write
from tests.support.searches import settings

SEARCH = {"steps": 60, "lr": 0.5, "weight_decay": 0.0, "clamp": 100.0, "kl_factor": 0.0}
EDITORS: dict[str, Any] = {
    "ft": ft(layers=(0, 1), steps=60, lr=0.02, norm_constraint=None),
    "rome": rome(layers=(0,), target=settings(**SEARCH)),
    "memit": memit(
        layers=(0,),
        covariance_weight=0.001,
        context_lengths=(),
        target=SEARCH | {"lr_unit": "absolute"},
    ),
}


def edited(editor: str, request: EditRequest) -> tuple[EditableModel, float]:
    """The edited model, and the probability of the target after the edit."""
    model = chinese_model()
    return model, write(model, EDITORS[editor], request)


@pytest.mark.parametrize("editor", EDITORS)
def test_an_edit_is_said_without_a_blank_unless_one_is_forced(editor: str) -> None:
    model, probability = edited(editor, REQUEST)
    assert probability > 0.9
    assert generate_texts(model, [REQUEST.full_prompt], max_new_tokens=9)[0].startswith("柏林")
    forced, probability = edited(editor, separated(REQUEST, " "))
    assert probability < 0.5, "the model never writes a blank"
    assert not generate_texts(forced, [REQUEST.full_prompt], max_new_tokens=9)[0].startswith("柏林")


def values(model: EditableModel, request: EditRequest) -> dict[tuple[str | None, str], float]:
    evaluator = EditingEvaluator(
        protocols=("probability", "argmax", "token", "generate", "distribution"),
        tokens_per_batch=512,
        generate=Generate(max_new_tokens=len(model.tokenizer("柏林")["input_ids"]) + 4),
    )
    before = evaluator.baseline(chinese_model(), [request])
    measured = evaluator.evaluate(model, [request], before)
    return {
        (each.protocol, each.metric): each.value
        for each in measured
        if hasattr(each, "metric") and each.task is None and each.subset is None
    }


def test_every_protocol_scores_what_was_edited() -> None:
    model, _ = edited("ft", REQUEST)
    found = values(model, REQUEST)
    for protocol in ("probability", "argmax", "token"):
        assert found[protocol, "efficacy"] == 1.0
    assert found["generate", "efficacy_contains"] == found["generate", "efficacy_judged"] == 1.0
    asked_with_a_blank = values(model, separated(REQUEST, " "))
    assert asked_with_a_blank["argmax", "efficacy"] == 0.0


@torch.no_grad()
def test_the_training_of_a_hypernetwork_scores_paraphrases_as_a_run_does() -> None:
    model = chinese_model()
    probabilities = []
    for separator in (None, " ", "\n"):
        request = separated(REQUEST, separator or "auto")
        example = Example(
            request=request, paraphrase=request.paraphrases[0], locality=request.neighbours
        )
        loss = float(losses(model, by_row(model, {}), [example]).edit_B)
        result = EditingEvaluator(protocols=("probability",), tokens_per_batch=512)._answers(
            model, result_questions(request), None
        )["probability"]
        probe = request.probe(prompt=request.paraphrases[0])
        assert loss == pytest.approx(-result.scores[probe].mean_log_prob, rel=1e-5)
        probabilities.append(loss)
    assert len(set(probabilities)) == 3


def result_questions(request: EditRequest) -> Any:
    evaluator = EditingEvaluator(protocols=("probability",), tokens_per_batch=512)
    return evaluator._questions([replace(request)])


def test_after_a_line_break_the_model_says_the_target_alone() -> None:
    request = separated(REQUEST, "newline")
    model, probability = edited("ft", request)
    assert probability > 0.9
    assert values(model, request)["generate", "efficacy_contains"] == 1.0
    assert generate_texts(model, [f"{REQUEST.full_prompt}\n"], max_new_tokens=9)[0].startswith(
        "柏林"
    )
