"""Free generation, the judge, and distances of distributions: known models give known numbers, and
the canaries sing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from editkit.config.experiment import Measuring
from editkit.datasets.world import WorldDataset
from editkit.errors import ConfigError
from editkit.evaluation.base import Moment, Samples
from editkit.evaluation.editing import EditingEvaluator
from editkit.evaluation.protocols.base import Answers, Questions, in_context
from editkit.evaluation.protocols.distribution import Distribution
from editkit.evaluation.protocols.generate import Generate
from editkit.evaluation.protocols.judge import AbstractJudge, Generated, StringJudge
from editkit.evaluation.protocols.matching import contains, is_match, normalise
from editkit.evaluation.scoring.frozen_text import from_bytes, to_bytes
from editkit.evaluation.scoring.greedy import continue_greedily
from editkit.evaluation.scoring.teacher_forcing import DistributionRequest, score
from editkit.evaluation.statistics.subsets import everything
from editkit.evaluation.statistics.tally import Statistics
from editkit.model.generate import generate_texts
from editkit.model.tokens import encode_with_target
from editkit.types import EditRequest, Measurement, Probe
from tests.support.bigram import Bigram
from tests.support.helpers import KINDS, Kind, tiny_model

ALL: tuple[str, ...] = ("probability", "argmax", "token", "generate", "distribution")
REQUEST = EditRequest(
    id="test/0",
    prompt="{} is in",
    subject="Ada",
    target="New York",
    target_old="Paris",
    paraphrases=("Ada lives in",),
    neighbours=(Probe(prompt="Bob is in", answer="Rome"),),
    portability={
        "alias": (
            Probe(prompt="Countess Ada is in", answer="New York", aliases=("NYC", "the Big Apple")),
        )
    },
)


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


def whole(found: Sequence[Measurement | Samples]) -> dict[tuple[str | None, str], Measurement]:
    chosen = [
        each
        for each in found
        if isinstance(each, Measurement) and each.subset is None and each.task is None
    ]
    return {(each.protocol, each.metric): each for each in chosen}


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


# Distributions


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


# All protocols together


@pytest.fixture(scope="module")
def world() -> tuple[EditRequest, ...]:
    requests = WorldDataset(name="world", world_seed=0, order="file", limit=12).load(0).requests
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
