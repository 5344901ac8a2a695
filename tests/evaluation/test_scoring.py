"""The scoring engine: equal to the plain computation, whatever the batches, and no more work than
needed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.evaluation.scoring.teacher_forcing import TOKENS_OF_A_TREE, Score, score
from editkit.model.tokens import encode_with_target
from editkit.types import Probe
from tests.support.bigram import Bigram
from tests.support.helpers import KINDS, Kind, tiny_model

PROBES = [
    Probe(prompt=prompt, answer=answer)
    for prompt, answer in (
        ("The mother tongue of Léon Blum is", "French"),
        ("The mother tongue of Léon Blum is", "Occitan, 日本語 and English"),
        (
            "The mother tongue of Léon Blum is",
            "French and English",
        ),  # the first answer begins this one
        ("Apple is in", "Cupertino"),
        ("Apple is in", "Los Angeles"),
        ("Apple is in Los", "Angeles"),  # its context lies inside the one before
        ("What does Shakira play?", "The guitar"),
        ("Paris", "x"),
    )
]


def plain(model: Any, probe: Probe) -> tuple[list[float], list[int]]:
    """Log-probabilities and greedy choices of one answer, by one whole forward pass of its own."""
    sequence = encode_with_target(model.tokenizer, probe.prompt, probe.answer)
    with torch.no_grad():
        logits_TV = model.network(input_ids=torch.tensor([sequence.ids])).logits[0].double()
    predicted_TV = logits_TV[sequence.predicting].log_softmax(-1)
    return predicted_TV.gather(-1, torch.tensor(sequence.target_ids)[:, None])[
        :, 0
    ].tolist(), predicted_TV.argmax(-1).tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [True, False])
def test_scores_equal_those_of_one_plain_forward_pass_each(kind: Kind, bos: bool) -> None:
    model = tiny_model(kind, bos=bos)
    scores = score(model, PROBES, tokens_per_batch=64)
    assert list(scores) == PROBES
    for probe in PROBES:
        log_probs, greedy = plain(model, probe)
        assert scores[probe].log_probs == pytest.approx(log_probs, abs=1e-5)
        assert scores[probe].greedy == tuple(greedy)
        assert (
            scores[probe].tokens
            == encode_with_target(model.tokenizer, probe.prompt, probe.answer).target_ids
        )


@pytest.mark.parametrize("kind", KINDS)
def test_the_batch_size_changes_no_score(kind: Kind) -> None:
    model = tiny_model(kind)
    alone, some, together = (
        score(model, PROBES, tokens_per_batch=size) for size in (1, 40, 10_000)
    )
    for probe in PROBES:
        assert alone[probe].log_probs == pytest.approx(some[probe].log_probs, abs=1e-5)
        assert alone[probe].log_probs == pytest.approx(together[probe].log_probs, abs=1e-5)
        assert alone[probe].greedy == some[probe].greedy == together[probe].greedy


def test_the_same_probes_give_the_same_bits_and_repeated_ones_cost_nothing() -> None:
    model = tiny_model()
    assert score(model, PROBES, tokens_per_batch=64) == score(
        model, PROBES * 3, tokens_per_batch=64
    )


def test_a_known_model_gives_known_scores_for_answers_of_unequal_length() -> None:
    model = Bigram(bos=True)
    short, long = (
        Probe(prompt="Apple is", answer="French"),
        Probe(prompt="Apple is", answer="French Paris"),
    )
    model.say("Apple is", "French Paris", 0.5, 0.125)
    scores = score(model, [short, long], tokens_per_batch=100)
    assert scores[short].mean_log_prob == pytest.approx(math.log(0.5))
    assert scores[long].sum_log_prob == pytest.approx(math.log(0.5) + math.log(0.125))
    assert scores[long].mean_log_prob == pytest.approx(math.log(0.25))
    assert scores[long].probability == pytest.approx(0.25)
    assert scores[short].is_greedy and scores[long].is_greedy
    model.say("Apple is French", "Paris", 0.0001)  # less than each other token has
    assert not score(model, [long], tokens_per_batch=100)[long].is_greedy


def test_a_uniform_model_gives_each_token_its_share() -> None:
    model = Bigram()
    for found in score(model, PROBES, tokens_per_batch=100).values():
        assert found.log_probs == pytest.approx(
            [-math.log(len(model.tokenizer))] * len(found.tokens)
        )


def test_contexts_that_begin_another_one_are_not_run() -> None:
    model = Bigram()
    one_token = [
        Probe(prompt="The capital of France is", answer=answer)
        for answer in ("Paris", "French", "mother")
    ]
    assert all(
        len(found.tokens) == 1 for found in score(model, one_token, tokens_per_batch=1000).values()
    )
    assert [rows for rows, _ in model.shapes] == [1]  # three answers, one row
    model.shapes.clear()
    score(
        model,
        [*one_token, Probe(prompt="The capital of France is Paris", answer="and")],
        tokens_per_batch=1000,
    )
    assert [rows for rows, _ in model.shapes] == [1]


def test_examples_that_all_prompts_begin_with_are_run_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    examples = "Paris is in France. Rome is in Italy. " * 6
    probes = [
        Probe(prompt=f"{examples}{subject} is in", answer=answer)
        for subject in ("Bordeaux", "Cupertino", "Seattle", "Antarctica")
        for answer in ("France", "the continent of Antarctica")
    ]
    length = len(encode_with_target(model.tokenizer, examples, "x").ids)
    assert length > TOKENS_OF_A_TREE
    shapes: list[int] = []
    run = type(model).final_hidden

    def counted(self: Any, batch: Any) -> Any:
        shapes.append(batch.ids_BT.numel())
        return run(self, batch)

    monkeypatch.setattr(type(model), "final_hidden", counted)
    scores = score(model, probes, tokens_per_batch=512)
    assert sum(shapes) < 3 * length
    for probe in probes:
        assert scores[probe].log_probs == pytest.approx(plain(model, probe)[0], abs=1e-5)


def test_batches_stay_within_the_bound_and_are_of_like_length() -> None:
    model = Bigram()
    probes = [
        Probe(prompt=f"{index} Paris" + " Paris" * (index % 7), answer="Rome")
        for index in range(40)
    ]
    score(model, probes, tokens_per_batch=50)
    assert all(rows * width <= 50 for rows, width in model.shapes)
    assert [width for _, width in model.shapes] == sorted(
        (width for _, width in model.shapes), reverse=True
    )
    model.shapes.clear()
    score(model, probes, tokens_per_batch=1)
    assert [rows for rows, _ in model.shapes] == [1] * 40


def test_batches_are_halved_when_memory_runs_out() -> None:
    probes = [Probe(prompt=f"{index} Paris", answer="Rome") for index in range(64)]
    small, large = Bigram(memory=40), Bigram()
    assert score(small, probes, tokens_per_batch=300) == score(large, probes, tokens_per_batch=300)
    assert small.failures == 3  # 300, 150, 75; then 37 fit, and the bound is kept
    with pytest.raises(torch.OutOfMemoryError):
        score(Bigram(memory=1), probes, tokens_per_batch=300)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    model = Bigram()
    model.logits_VV = torch.zeros(1)  # too small
    with pytest.raises((RuntimeError, IndexError)):
        score(model, PROBES, tokens_per_batch=300)
    assert len(model.shapes) == 1


def test_numbers_that_are_not_finite_are_said_to_be_so() -> None:
    model = Bigram()
    probe, other = (
        Probe(prompt="Apple is", answer="French"),
        Probe(prompt="in the", answer="French"),
    )
    model.logits_VV[encode_with_target(model.tokenizer, "Apple is", "French").ids[-2]] = torch.nan
    scores = score(model, [probe, other], tokens_per_batch=100)
    assert (
        not scores[probe].is_finite
        and math.isnan(scores[probe].mean_log_prob)
        and math.isnan(scores[probe].probability)
    )
    assert scores[other].is_finite
    assert not Score((1,), (-math.inf,), (1,)).is_finite


def test_a_context_beyond_the_models_positions_loses_its_beginning() -> None:
    model = Bigram(max_length=8)
    probe = Probe(prompt="Paris " * 30 + "is", answer="French Paris")
    model.say("Paris is", "French Paris", 0.5, 0.125)
    assert score(model, [probe], tokens_per_batch=100)[probe].probability == pytest.approx(0.25)
    with pytest.raises(ConfigError, match="answer: exceeds the model's context length"):
        score(model, [Probe(prompt="Paris", answer="Rome " * 30)], tokens_per_batch=100)


def test_nothing_to_score_is_no_error_and_a_bound_below_one_is() -> None:
    assert score(Bigram(), [], tokens_per_batch=100) == {}
    with pytest.raises(ConfigError, match=r"tokens_per_batch: out of range \(got 0"):
        score(Bigram(), PROBES, tokens_per_batch=0)
