"""The protocol `distribution`: divergences of known distributions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from editkit.evaluation.editing import EditingEvaluator
from editkit.evaluation.protocols.distribution import Distribution
from editkit.evaluation.scoring.teacher_forcing import DistributionRequest, score
from editkit.model.tokens import encode_with_target
from editkit.types import EditRequest, Probe
from tests.support.bigram import Bigram
from tests.support.helpers import tiny_model
from tests.support.measurements import REQUEST, whole


def divergences(
    model: Any, other: Any, request: EditRequest, protocol: Distribution
) -> dict[str, float | None]:
    evaluator = EditingEvaluator(
        protocols=("distribution",), tokens_per_batch=512, distribution=protocol
    )
    baseline = evaluator.baseline(model, [request])
    return {
        metric: found.value
        for (_, metric), found in whole(evaluator.evaluate(other, [request], baseline)).items()
    }


def test_divergence_over_the_whole_vocabulary_is_that_of_the_plain_computation() -> None:
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    probe = Probe(prompt="The mother tongue of Léon Blum is", answer="French and English")
    request = dataclasses.replace(REQUEST, neighbours=(probe,))
    log_probs = []
    for each in (model, other):
        sequence = encode_with_target(each.tokenizer, probe.prompt, probe.answer)
        with torch.no_grad():
            logits_TV = each.network(input_ids=torch.tensor([sequence.ids])).logits[0]
        log_probs.append(logits_TV[sequence.predicting].double().log_softmax(-1))
    base_MV, now_MV = log_probs
    expected = float((base_MV.exp() * (base_MV - now_MV)).sum(-1).mean())
    whole_vocabulary = divergences(model, other, request, Distribution(kept=len(model.tokenizer)))
    assert whole_vocabulary["locality_kl_nats"] == pytest.approx(expected, rel=1e-4)
    some = divergences(model, other, request, Distribution(kept=16))["locality_kl_nats"]
    assert some is not None and 0 < some <= expected
    top = [
        len({*base.topk(5).indices.tolist()} & {*now.topk(5).indices.tolist()}) / 5
        for base, now in zip(base_MV, now_MV, strict=True)
    ]
    assert whole_vocabulary["locality_top5"] == pytest.approx(sum(top) / len(top))
    best_M = base_MV.argmax(-1, keepdim=True)
    kept = (now_MV.gather(-1, best_M) - base_MV.gather(-1, best_M)).exp().clamp(max=1).mean()
    assert whole_vocabulary["locality_probability"] == pytest.approx(float(kept), rel=1e-4)


def test_a_known_change_has_the_divergence_of_the_textbook() -> None:
    model: Any = Bigram(bos=True)
    request = dataclasses.replace(REQUEST, neighbours=(Probe(prompt="Bob is in", answer="Paris"),))
    model.say("is in", "Paris", 0.5)
    evaluator = EditingEvaluator(
        protocols=("distribution",),
        tokens_per_batch=100,
        distribution=Distribution(top_k=1, kept=1),
    )
    baseline = evaluator.baseline(model, [request])
    model.say("is in", "Paris", 0.2)
    found = {
        metric: each.value
        for (_, metric), each in whole(evaluator.evaluate(model, [request], baseline)).items()
    }
    assert found["locality_kl_nats"] == pytest.approx(
        0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8), rel=1e-5
    )
    assert found["locality_probability"] == pytest.approx(0.2 / 0.5, rel=1e-5)
    assert found["locality_top1"] == 1.0, "it still is the most probable one"


def test_asked_distributions_are_the_same_whatever_the_size_of_the_pieces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    probes = [
        Probe(prompt="Apple is in", answer="Los Angeles"),
        Probe(prompt="Apple is in Los", answer="Angeles and Rome"),
    ]
    probes += [Probe(prompt=f"{index} is in", answer="Paris and Rome") for index in range(5)]
    request = DistributionRequest(top=3, probes=dict.fromkeys(probes))
    whole_scores = score(model, probes, tokens_per_batch=512, distributions=request)
    monkeypatch.setattr(
        "editkit.evaluation.scoring.teacher_forcing.LOGITS_AT_ONCE", 2 * len(model.tokenizer)
    )
    in_pieces = score(model, probes, tokens_per_batch=512, distributions=request)
    for probe in probes:
        one, other = whole_scores[probe].next_tokens, in_pieces[probe].next_tokens
        assert one is not None and other is not None
        assert len(one.top_MK) == len(whole_scores[probe].tokens)
        assert torch.equal(one.top_MK, other.top_MK) and one.top_MK[:, 0].tolist() == list(
            whole_scores[probe].greedy
        )
        torch.testing.assert_close(one.top_log_probs_MK, other.top_log_probs_MK)
