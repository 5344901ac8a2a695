"""The editing evaluator on whole models: a hand-built one with known numbers, no edit, and random
weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch

from editkit.errors import ConfigError
from editkit.evaluation.editing import EditingEvaluator
from editkit.types import EditRequest, Probe
from tests.support.bigram import Bigram
from tests.support.helpers import KINDS, Kind, tiny_model, world_requests
from tests.support.measurements import request, whole


@pytest.fixture(scope="module")
def requests() -> Sequence[EditRequest]:
    return world_requests(25)


def test_a_hand_built_model_is_measured_end_to_end() -> None:
    model = Bigram(bos=True)
    edited = request(
        "The",
        prompt="The {} is",
        subject="capital",
        target="French Paris",
        target_old="Paris",
        paraphrases=("It is",),
    )
    edited = dataclasses.replace(
        edited, neighbours=(Probe(prompt="The mother", answer="tongue"),), portability={}
    )
    model.say("It is", "Paris", 0.3)
    evaluator = EditingEvaluator(protocols=("probability", "argmax"), tokens_per_batch=100)
    baseline = evaluator.baseline(model, [edited])  # type: ignore[arg-type]
    assert baseline["greedy/test/The"].dtype == torch.int32

    def measured() -> dict[tuple[str | None, str], float | None]:
        return {
            place: found.value
            for place, found in whole(evaluator.evaluate(model, [edited], baseline)).items()
        }  # type: ignore[arg-type]

    before = measured()
    assert (
        before["probability", "efficacy"],
        before["argmax", "efficacy"],
        before["argmax", "locality"],
    ) == (0.0, 0.0, 1.0)
    model.say("It is", "French Paris", 0.6, 0.7)
    model.say("The mother", "tongue", 0.9)
    after = measured()
    assert (
        after["probability", "efficacy"],
        after["argmax", "efficacy"],
        after["argmax", "generalization"],
    ) == (1.0, 1.0, 1.0)
    assert after["probability", "efficacy_magnitude"] == pytest.approx(
        math.sqrt(0.6 * 0.7) - 0.4 / (len(model.tokenizer) - 1)
    )
    assert (after["probability", "locality"], after["argmax", "locality"]) == (
        1.0,
        0.0,
    )  # more probable than the target, yet not as before


def test_no_edit_leaves_locality_at_exactly_one_and_random_weights_bring_it_near_chance(
    requests: Sequence[EditRequest],
) -> None:
    evaluator = EditingEvaluator(protocols=("probability", "argmax"), tokens_per_batch=2048)
    model, other = tiny_model("gpt2"), tiny_model("gpt2", seed=1)
    baseline = evaluator.baseline(model, requests)
    unedited = whole(evaluator.evaluate(model, requests, baseline))
    assert (
        unedited["argmax", "locality"].value == 1.0 and unedited["argmax", "locality"].stderr == 0.0
    )
    assert unedited["argmax", "efficacy"].value == 0.0
    random = whole(evaluator.evaluate(other, requests, baseline))
    assert (
        random["argmax", "locality"].value is not None and random["argmax", "locality"].value < 0.1
    )
    for metric in ("efficacy", "generalization", "locality"):
        assert random["probability", metric].value == pytest.approx(0.5, abs=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_the_requests_is_measured_as_it_would_be_alone(
    kind: Kind, requests: Sequence[EditRequest]
) -> None:
    evaluator = EditingEvaluator(protocols=("argmax",), tokens_per_batch=2048)
    model = tiny_model(kind)
    found = evaluator.evaluate(model, requests[:3], evaluator.baseline(model, requests[:6]))
    by_metric = {metric: measured for (_, metric), measured in whole(found).items()}
    assert [by_metric[metric].n for metric in ("efficacy", "generalization", "locality")] == [
        3,
        3,
        3,
    ]
    assert by_metric["locality"].value == 1.0
    assert evaluator.evaluate(model, (), {}) == []


def test_an_unknown_protocol_is_an_error() -> None:
    with pytest.raises(
        ConfigError,
        match=r"protocols\.0: invalid value \(got 'greedy'; expected one of probability, argmax",
    ):
        EditingEvaluator(protocols=("greedy",), tokens_per_batch=64)  # type: ignore[arg-type]
