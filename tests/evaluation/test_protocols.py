"""All protocols together: the canaries without an edit and with random weights, the context, and
impossible options."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from editkit.config.experiment import Measuring
from editkit.errors import ConfigError
from editkit.evaluation.base import Moment, Samples
from editkit.evaluation.editing import EditingEvaluator
from editkit.evaluation.protocols.base import in_context
from editkit.evaluation.protocols.distribution import Distribution
from editkit.evaluation.protocols.generate import Generate
from editkit.types import EditRequest, Probe
from tests.support.bigram import Bigram
from tests.support.helpers import KINDS, Kind, tiny_model, world_requests
from tests.support.measurements import REQUEST, whole

ALL: tuple[str, ...] = ("probability", "argmax", "token", "generate", "distribution")


def test_impossible_options_are_named() -> None:
    with pytest.raises(ConfigError, match=r"top_k: out of range \(got 9; expected 1 to kept=4"):
        Distribution(top_k=9, kept=4)
    with pytest.raises(ConfigError) as raised:
        EditingEvaluator(protocols=(), tokens_per_batch=0, context="no place", block_size=0)
    for part in (
        "tokens_per_batch: out of range (got 0",
        "context: invalid template (got 'no place'",
        "block_size: out of range (got 0",
    ):
        assert part in str(raised.value)
    with pytest.raises(ConfigError, match=r"max_requests: out of range \(got 0"):
        Measuring(max_requests=0)


@pytest.fixture(scope="module")
def world() -> tuple[EditRequest, ...]:
    requests = world_requests(12)
    far = tuple(
        Probe(prompt=f"who sang song number {index}", answer=f"singer {index}")
        for index in range(2)
    )
    return tuple(
        dataclasses.replace(each, locality={"out_of_distribution": far}) for each in requests
    )


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_edit_every_locality_is_exactly_one_and_the_divergence_exactly_zero(
    kind: Kind, world: Sequence[EditRequest]
) -> None:
    model = tiny_model(kind)
    evaluator = EditingEvaluator(
        protocols=ALL, tokens_per_batch=1024, generate=Generate(max_new_tokens=4)
    )
    baseline = evaluator.baseline(model, world)
    found = {
        place: each
        for place, each in whole(evaluator.evaluate(model, world, baseline)).items()
        if place[1].startswith("locality")
    }
    localities = {place for place in found if place[0] not in ("probability",)}
    assert {name for _, name in localities} >= {
        "locality",
        "locality_out_of_distribution",
        "locality_kl_nats",
        "locality_top5",
    }
    for place in localities:
        assert found[place].value == (0.0 if place[1].endswith("kl_nats") else 1.0), place
        assert found[place].nonfinite == 0


def test_random_weights_bring_every_locality_near_chance(world: Sequence[EditRequest]) -> None:
    model, other = tiny_model("gpt2"), tiny_model("gpt2", seed=1)
    evaluator = EditingEvaluator(
        protocols=ALL, tokens_per_batch=1024, generate=Generate(max_new_tokens=4)
    )
    found = whole(evaluator.evaluate(other, world, evaluator.baseline(model, world)))
    for protocol, metric in (
        ("argmax", "locality"),
        ("token", "locality"),
        ("generate", "locality"),
        ("distribution", "locality_top5"),
    ):
        value = found[protocol, metric].value
        assert value is not None and value < 0.15, (protocol, metric)
    divergence, kept = (
        found["distribution", "locality_kl_nats"].value,
        found["distribution", "locality_probability"].value,
    )
    assert divergence is not None and divergence > 0.2 and kept is not None and kept < 0.6


def test_before_the_first_edit_nothing_is_asked_twice(world: Sequence[EditRequest]) -> None:
    model = tiny_model("gpt2")
    evaluator = EditingEvaluator(
        protocols=ALL, tokens_per_batch=1024, generate=Generate(max_new_tokens=4)
    )
    baseline = evaluator.baseline(model, world)
    moment = Moment(view="unrestrained", positions=tuple(range(1, 7)), is_before=True)
    silent: Any = None  # a model that cannot be asked
    before = evaluator.measure(silent, world[:6], baseline, {}, moment)
    asked = evaluator.measure(
        model, world[:6], baseline, {}, dataclasses.replace(moment, is_before=False)
    )
    again = whole(asked)
    assert len(whole(before)) == len(again)
    for place, each in whole(before).items():
        assert (each.n, each.value) == (
            again[place].n,
            pytest.approx(again[place].value, abs=1e-5),
        ), place
    rows = [[each.rows for each in found if isinstance(each, Samples)] for found in (before, asked)]
    assert rows[0] == rows[1] and len(rows[0]) == 1


def test_every_prompt_is_put_into_the_context() -> None:
    found = in_context(
        dataclasses.replace(REQUEST, locality={"forgetfulness": REQUEST.neighbours}), "Q: {} A:"
    )
    assert (found.full_prompt, found.paraphrases) == ("Q: Ada is in A:", ("Q: Ada lives in A:",))
    assert (
        found.neighbours
        == found.locality["forgetfulness"]
        == (Probe(prompt="Q: Bob is in A:", answer="Rome"),)
    )
    assert (
        found.portability["alias"][0].prompt == "Q: Countess Ada is in A:"
        and found.portability["alias"][0].aliases
    )
    assert in_context(REQUEST, "{}") is REQUEST
    model: Any = Bigram(bos=True)
    model.say("so", "Paris", 0.9)
    evaluator = EditingEvaluator(protocols=("argmax",), tokens_per_batch=100, context="{} so")
    request = dataclasses.replace(REQUEST, target="Paris", target_old=None)
    measured = whole(evaluator.evaluate(model, [request], evaluator.baseline(model, [request])))
    assert (
        measured["argmax", "efficacy"].value == 1.0
        and measured["argmax", "efficacy"].context == "{} so"
    )
