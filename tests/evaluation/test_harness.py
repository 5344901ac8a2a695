"""The harness's HFLM over the model that is edited: the numbers of a bare HFLM, whatever the
batches, and no copy of anything.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.evaluation.harness.lm import harness_model, quiet
from editkit.linalg.lowrank import LowRank
from editkit.model.editable import EditableModel
from tests.support.helpers import KINDS, Kind, tiny_model

PROMPTS = (
    "What does Shakira play?",
    "The capital of France is Paris, and the capital of Italy is",
    "Édouard Daladier speaks",
    "English, French, Spanish and 日本語 are languages. " * 12,  # longer than the model's positions
    "x",
    "The Eiffel Tower is located in the city of ",  # a blank at its end
    "A line\nand another",
)
CHOICES = (" Paris", " the guitar and the guitar", "\n")


def instance(kind: str, *arguments: object) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


def generation(prompt: str, *, until: list[str], tokens: int = 12) -> Any:
    return instance(
        "generate_until",
        prompt,
        {"until": until, "do_sample": False, "temperature": 0.0, "max_gen_toks": tokens},
    )


def bare(model: EditableModel) -> Any:
    """A plain HFLM, an item at a time."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        return HFLM(
            pretrained=model.network,
            tokenizer=copy.deepcopy(model.tokenizer),
            max_length=model.max_length,
            batch_size=1,
        )


def generations() -> list[Any]:
    likely = [generation(prompt, until=["\n"]) for prompt in PROMPTS]
    return (
        likely
        + [generation(prompt, until=["e", "is in"]) for prompt in PROMPTS]
        + [generation("x", until=[], tokens=3)]
    )


def choices() -> list[Any]:
    return [
        instance("loglikelihood", context, choice)
        for context in (*PROMPTS, "")
        for choice in CHOICES
    ]


@pytest.mark.parametrize(
    ("kind", "bos"), [("gpt2", False), ("gpt2", True), ("llama", True), ("gptj", False)]
)
def test_answers_are_those_of_a_bare_hflm_one_by_one_and_in_batches(kind: Kind, bos: bool) -> None:
    model = tiny_model(kind, bos=bos)
    with quiet():
        reference = bare(model)
        texts = reference.generate_until(generations(), disable_tqdm=True)
        scores = reference.loglikelihood(choices(), disable_tqdm=True)
    assert len(set(texts)) > 5
    for tokens_per_batch in (
        1,
        4096,
    ):  # a batch of one, and batches that are padded on the left and on the right
        lm = harness_model(model, tokens_per_batch=tokens_per_batch)
        assert lm.generate_until(generations()) == texts
        found = lm.loglikelihood(choices(), disable_tqdm=True)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in scores]
        assert [number for number, _ in found] == pytest.approx(
            [number for number, _ in scores], abs=2e-4
        )


def test_whole_texts_are_scored_as_a_bare_hflm_scores_them() -> None:
    model = tiny_model("gpt2")
    requests = [instance("loglikelihood_rolling", text) for text in PROMPTS]
    with quiet():
        reference = bare(model).loglikelihood_rolling(requests, disable_tqdm=True)
        assert harness_model(model, tokens_per_batch=256).loglikelihood_rolling(
            requests, disable_tqdm=True
        ) == pytest.approx(reference)


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_at_once_say_what_each_says_alone(kind: Kind) -> None:
    model = tiny_model(kind)
    requests = [
        generation(f"{PROMPTS[index % 3]} {'and ' * index}", until=["\n"], tokens=8)
        for index in range(16)
    ]
    alone = [
        harness_model(model, tokens_per_batch=1).generate_until([request])[0]
        for request in requests
    ]
    assert harness_model(model, tokens_per_batch=10**6).generate_until(requests) == alone


def test_it_shares_the_network_and_leaves_the_tokenizer_as_it_is() -> None:
    model = tiny_model("gpt2")
    pointers = {name: parameter.data_ptr() for name, parameter in model.network.named_parameters()}
    assert model.tokenizer.pad_token is None
    lm = harness_model(model, tokens_per_batch=64)
    assert lm.model is model.network
    assert lm.generate_until([generation("x", until=["\n"])])
    assert model.tokenizer.pad_token is None
    assert {
        name: parameter.data_ptr() for name, parameter in model.network.named_parameters()
    } == pointers


def test_every_edit_is_seen_at_once_and_gone_when_it_is_taken_back() -> None:
    model = tiny_model("llama")
    module = model.family.down_projection(1)
    model.edit([module])
    lm = harness_model(model, tokens_per_batch=256)
    before = lm.loglikelihood(choices(), disable_tqdm=True)
    rows, columns = model.weight(module).shape
    with model.temporarily({module: LowRank(torch.ones(rows, 1), torch.ones(columns, 1))}):
        edited = lm.loglikelihood(choices(), disable_tqdm=True)
    assert edited != before
    assert lm.loglikelihood(choices(), disable_tqdm=True) == before


def test_no_text_is_tokenised_twice() -> None:
    model = tiny_model("gpt2")
    lm = harness_model(model, tokens_per_batch=256)
    first = lm.generate_until(generations()), lm.loglikelihood(choices(), disable_tqdm=True)
    known = dict(lm.encoded)

    class NoTokenizer:
        """Decodes, and nothing else."""

        def decode(self, *given: Any, **options: Any) -> str:
            return str(model.tokenizer.decode(*given, **options))

        eos_token_id = bos_token_id = model.tokenizer.eos_token_id

    lm.tokenizer = NoTokenizer()
    assert (
        lm.generate_until(generations()),
        lm.loglikelihood(choices(), disable_tqdm=True),
    ) == first
    assert lm.encoded == known


def test_a_prompt_that_is_too_long_loses_its_beginning_and_is_counted() -> None:
    model = tiny_model("llama")
    lm = harness_model(model, tokens_per_batch=256)
    long, tokens = PROMPTS[3], len(model.tokenizer(PROMPTS[3]).input_ids)
    assert tokens > model.max_length
    request = generation(long, until=["\n"], tokens=20)
    assert lm.prompt_ids(request) == model.tokenizer(long).input_ids[-(model.max_length - 20) :]
    assert lm.cut(request) == tokens - (model.max_length - 20)
    assert lm.cut(generation("x", until=[])) == 0
    choice = instance("loglikelihood", long, " Paris")
    assert (
        lm.cut(choice)
        == len(model.tokenizer(f"{long.rstrip()}  Paris").input_ids) - model.max_length - 1
    )


def test_generations_can_be_bounded() -> None:
    model = tiny_model("gpt2")
    request = generation("x", until=[], tokens=40)
    full = harness_model(model, tokens_per_batch=256).generate_until([request])[0]
    short = harness_model(model, tokens_per_batch=256, max_new_tokens=3).generate_until([request])[
        0
    ]
    assert full.startswith(short) and len(short) < len(full)


def test_numbers_that_are_not_finite_come_back_as_such() -> None:
    model = tiny_model("gpt2")
    module = model.family.down_projection(0)
    model.edit([module])
    rows, columns = model.weight(module).shape
    with model.temporarily(
        {module: LowRank(torch.full((rows, 1), math.inf), torch.ones(columns, 1))}
    ):
        found = harness_model(model, tokens_per_batch=256).loglikelihood(
            choices()[:2], disable_tqdm=True
        )
    assert all(math.isnan(number) for number, _ in found)


def test_an_answer_longer_than_the_model_is_an_error() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(
        ConfigError, match=r"answer: exceeds the model's context length .*expected at most 128\)"
    ):
        harness_model(model, tokens_per_batch=256).loglikelihood(
            [instance("loglikelihood", "x", PROMPTS[3] * 3)], disable_tqdm=True
        )
