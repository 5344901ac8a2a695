"""A memory of texts stands before each prompt by itself, whatever the batch, the padding and the
cache: the model reads what a user would have typed.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editkit.api.session import Session
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.model.editable import EditableModel
from editkit.model.generate import generate
from editkit.model.shortcuts import Comparison, Shortcuts
from editkit.model.side_routes import context_tokens, routed
from editkit.model.tokens import encode_prompts, pad
from editkit.types import Probe
from tests.model.test_beside import probes
from tests.support.helpers import KINDS, Kind, request, requests, tiny_model
from tests.support.memories import ICE, remembering

RAG = replace(ICE, threshold=0.5)  # leaves prompts alone that repeat little of an edit
APART = "Shakira sings."


def typed(model: EditableModel, prompt: str) -> str:
    """What stands in place of a prompt, put together by hand."""
    asked = set(prompt.lower().replace("'", " ").split())

    def share(index: int) -> float:
        words = request(index).full_prompt.lower().replace("'", " ").split()
        return sum(word in asked for word in words) / len(words)

    best = max(range(3), key=share)
    own = request(best)
    fact = f"New Fact: {own.full_prompt} {own.target}\n"
    return f"{fact}Prompt: {prompt}"


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_text_with_the_fact_in_every_batch(kind: Kind) -> None:
    model = remembering(kind)
    asked = [probe for each in requests(3) for probe in (each.probe(), *each.neighbours)]
    asked += [replace(probe, answer="Rome, and so on") for probe in asked]
    together = score(model, asked, tokens_per_batch=512)
    alone = {probe: score(model, [probe], tokens_per_batch=1)[probe] for probe in asked}
    sides = model.sides
    model.attach()
    written = {probe: replace(probe, prompt=typed(model, probe.prompt)) for probe in asked}
    plain = score(model, written.values(), tokens_per_batch=1)
    without = score(model, asked, tokens_per_batch=1)
    model.attach(*sides)
    for probe in asked:
        assert together[probe].log_probs == pytest.approx(alone[probe].log_probs, abs=1e-4)
        assert together[probe].log_probs == pytest.approx(plain[written[probe]].log_probs, abs=1e-4)
        assert together[probe].log_probs != pytest.approx(without[probe].log_probs, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_that_of_the_text_with_the_fact_in_every_batch_and_without_a_cache(
    kind: Kind,
) -> None:
    model = remembering(kind)
    texts = [probe.prompt for probe in probes()][:16]
    rows = encode_prompts(model.tokenizer, texts)
    new = functools.partial(generate, model, rows, max_new_tokens=5, ends=())
    of_sixteen, of_one = new(batch_size=16), new(batch_size=1)
    before = model.shortcuts
    model.shortcuts = Shortcuts(
        comparisons=(Comparison(shortcut="generation", differences={"x": 1.0}, tolerance=0.0),)
    )
    uncached = new(batch_size=16)
    model.shortcuts = before
    sides = model.sides
    read = [side.read_as(texts, model.reader.choose) for side in sides]  # type: ignore[attr-defined]
    model.attach()
    plain = generate(
        model,
        encode_prompts(model.tokenizer, [str(text) for text in read[0]]),
        max_new_tokens=5,
        ends=(),
    )
    assert of_sixteen == of_one == uncached == plain
    assert generate(model, rows, max_new_tokens=5, ends=()) != plain


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_own_calls_read_each_row_as_a_prompt_of_its_own(kind: Kind) -> None:
    model = remembering(kind, RAG)
    texts = [request(0).full_prompt, APART, request(1).full_prompt, request(2).full_prompt[:-3]]
    rows = encode_prompts(model.tokenizer, texts)
    ours = generate(model, rows, max_new_tokens=4, ends=())
    batch = pad(rows, side="left")
    settings = {
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    theirs = model.network.generate(
        **{name: batch.arguments[name] for name in ("input_ids", "attention_mask")}, **settings
    )
    assert [tuple(row[-4:].tolist()) for row in theirs] == ours
    for row, new in zip(rows, ours, strict=True):
        alone = model.network.generate(input_ids=torch.tensor([row]), **settings)
        assert tuple(alone[0, len(row) :].tolist()) == new
    right = pad(rows)
    with torch.no_grad():
        logits_BTV = model.network(**right.arguments).logits
        assert logits_BTV.shape[:2] == right.ids_BT.shape
        sides = model.sides
        read = model.reader.prompted(rows)
        model.attach()
        for number, (row, ids) in enumerate(zip(rows, read, strict=True)):
            plain_TV = model.network(input_ids=torch.tensor([ids])).logits[0]
            count = min(len(row), 2)
            ours_TV = logits_BTV[number, len(row) - count : len(row)]
            assert torch.allclose(ours_TV, plain_TV[-count:], atol=1e-4)
        model.attach(*sides)


def test_lm_eval_reads_each_request_by_its_own_prompt() -> None:
    from lm_eval.api.instance import Instance

    from editkit.evaluation.harness.lm import harness_model

    model = remembering("gpt2", RAG)
    asked = [each.probe() for each in requests(3)] + [Probe(prompt=APART, answer="Paris")]
    wanted = [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=(probe.prompt, f" {probe.answer}"),
            idx=index,
        )
        for index, probe in enumerate(asked)
    ]
    found = harness_model(model, tokens_per_batch=512).loglikelihood(wanted, disable_tqdm=True)
    ours = score(model, asked, tokens_per_batch=1)
    assert [value for value, _ in found] == pytest.approx(
        [ours[probe].sum_log_prob for probe in asked], abs=1e-4
    )


def test_a_prompt_that_nothing_is_similar_to_and_running_text_are_read_as_they_are() -> None:
    model = tiny_model("llama")
    foreign = encode_prompts(model.tokenizer, [APART])
    window = pad([foreign[0]], prompts=[1])  # as perplexity states it
    with torch.no_grad():
        before = model.network(**pad(foreign).arguments).logits
        running = model.final_hidden(window)
        session = Session(model, RAG)
        session.edit(request(0))
        assert torch.equal(model.network(**pad(foreign).arguments).logits, before)
        assert torch.equal(model.final_hidden(window), running)
        own = encode_prompts(model.tokenizer, [request(0).full_prompt])
        edited = model.network(**pad(own).arguments).logits
        model.undo()
        assert not torch.equal(model.network(**pad(own).arguments).logits, edited)
        assert not model.sides
    assert model.reader.prompted(own) == own


def test_routing_says_which_prompts_get_a_text_and_how_many_tokens() -> None:
    model = remembering("gpt2", RAG)
    rows = encode_prompts(model.tokenizer, [request(0).full_prompt, APART])
    assert routed(model, rows) == [True, False]
    read = typed(model, request(0).full_prompt)
    [ids] = encode_prompts(model.tokenizer, [read])
    assert context_tokens(model, rows) == [len(ids) - len(rows[0]), 0]
    model.attach()
    assert context_tokens(model, rows) is None


def test_in_a_chat_template_the_fact_stands_inside_the_users_turn(tmp_path: Path) -> None:
    from editkit.model.chat import chat_template

    jinja = tmp_path / "chat.jinja"
    jinja.write_text(
        "{% for each in messages %}{{ each['role'] }}: {{ each['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model = tiny_model("gpt2")
    model.chat = chat_template(model.tokenizer, str(jinja))
    Session(model, ICE).edit(request(0))
    rows = encode_prompts(model.tokenizer, [APART], chat=model.chat)
    [ids] = model.reader.prompted(rows)
    own = request(0)
    text = f"user: New Fact: {own.full_prompt} {own.target}\nPrompt: {APART}\nassistant: "
    assert model.tokenizer.decode(ids) == text


def test_a_prompt_with_its_texts_loses_its_beginning_where_it_does_not_fit() -> None:
    model = remembering("gpt2")
    [row] = encode_prompts(model.tokenizer, [APART])
    [whole] = model.reader.prompted([row])
    assert model.reader.prompted([row], longest=len(row) + 2) == [whole[-len(row) - 2 :]]
    assert generate(model, [row], max_new_tokens=model.max_length - len(row), ends=())
