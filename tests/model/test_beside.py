"""What stands beside the weights routes each sequence by itself, whatever the batch, the padding
and the cache; without it the model is the unedited one, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from editkit.api.session import Session
from editkit.editors.codebook import Codebook
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.model.beside import NONE
from editkit.model.continuation import CachedContinuation, PlainContinuation
from editkit.model.editable import EditableModel
from editkit.model.generate import generate
from editkit.model.side_routes import routed
from editkit.model.tokens import encode_prompts, pad
from editkit.types import Probe
from tests.editors.test_grace import GRACE
from tests.support.helpers import KINDS, Kind, request, requests, tiny_model
from tests.support.sides import PLAIN, probes, prompts

VARIANTS = [("gpt2", "last"), ("llama", "prompt"), ("gptj", "last")]


def edited(kind: Kind, replaced: str = "last") -> EditableModel:
    """A model with three entries beside a matrix of its second layer."""
    model = tiny_model(kind)
    session = Session(model, replace(GRACE, replace=replaced, lr=1.0))
    for each in requests(3):
        session.edit(each)
    assert len(model.sides) == 1
    return model


def plainly(model: EditableModel, probe: Probe) -> tuple[float, ...]:
    """Log-probabilities by a pass of the network over one row, whose hook is written here."""
    from editkit.model.tokens import encode_with_targets

    (side,) = model.sides
    assert isinstance(side, Codebook)
    [sequence] = encode_with_targets(model.tokenizer, [probe])
    last = sequence.start - 1

    def put(_module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        [entry] = side.covering(args[0][0, last][None]).tolist()
        if entry == NONE:
            return output
        first = last if side.options()["replace"] == "last" else 0
        output = output.clone()
        output[0, first : last + 1] = side.state()["values"][entry]
        return output

    model.attach()
    try:
        with model.module(side.module).register_forward_hook(put), torch.no_grad():
            ids = torch.tensor([sequence.ids[:-1]])
            log_probs_TV = model.network(input_ids=ids).logits[0].log_softmax(-1)
    finally:
        model.attach(side)
    places = range(last, last + len(sequence.target_ids))
    return tuple(
        float(log_probs_TV[place, token])
        for place, token in zip(places, sequence.target_ids, strict=True)
    )


@pytest.mark.parametrize(("kind", "replaced"), VARIANTS)
def test_batched_scores_with_shared_prefixes_are_those_of_one_text_at_a_time(
    kind: Kind, replaced: str
) -> None:
    model = edited(kind, replaced)
    asked = probes()
    together = score(model, asked, tokens_per_batch=512)
    alone = {probe: score(model, [probe], tokens_per_batch=1)[probe] for probe in asked}
    for probe in asked:
        assert together[probe].log_probs == pytest.approx(alone[probe].log_probs, abs=1e-4)
        assert together[probe].log_probs == pytest.approx(plainly(model, probe), abs=1e-4)
    changed = [probe for probe in asked if is_changed(model, probe, together[probe].log_probs)]
    assert set(changed) >= {each.probe() for each in requests(3)}
    assert len(changed) < len(set(asked)), "other prompts are left alone"


def is_changed(model: EditableModel, probe: Probe, log_probs: Sequence[float]) -> bool:
    sides = model.sides
    model.attach()
    before = score(model, [probe], tokens_per_batch=64)[probe].log_probs
    model.attach(*sides)
    return log_probs != pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize(("kind", "replaced"), VARIANTS)
def test_generation_is_the_same_in_every_batch_with_and_without_a_cache(
    kind: Kind, replaced: str
) -> None:
    model = edited(kind, replaced)
    rows = prompts(model)
    new = functools.partial(generate, model, rows, max_new_tokens=5, ends=())
    of_sixteen, of_one = new(batch_size=16), new(batch_size=1)
    model.shortcuts = PLAIN
    uncached = new(batch_size=16)
    assert of_sixteen == of_one == uncached
    sides = model.sides
    model.attach()
    assert new(batch_size=16) != of_one, "the edits change what is generated"
    model.attach(*sides)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_the_same_with_padding_left_and_right_and_with_a_cache(
    kind: Kind,
) -> None:
    model = edited(kind)
    rows = prompts(model)
    lengths = [len(row) for row in rows]
    with torch.no_grad():
        last = {}
        for side in ("left", "right"):
            batch = pad(rows, side=side, prompts=lengths)  # type: ignore[arg-type]
            hidden_BTD = model.final_hidden(batch)
            columns_B = batch.columns([length - 1 for length in lengths])
            last[side] = hidden_BTD[torch.arange(len(rows)), columns_B]
        texts = [CachedContinuation(model, rows), PlainContinuation(model, rows)]
        done_B = torch.zeros(len(rows), dtype=torch.bool)
        for token in (5, 9):
            cached_BD, plain_BD = (text.last_hidden() for text in texts)
            assert torch.allclose(cached_BD, plain_BD, atol=1e-4)
            last.setdefault("cached", cached_BD)
            for text in texts:
                text.append(torch.full((len(rows),), token), done_B)
    assert torch.allclose(last["left"], last["right"], atol=1e-4)
    assert torch.allclose(last["left"], last["cached"], atol=1e-4)


def test_transformers_own_calls_route_each_row_by_its_last_token() -> None:
    model = edited("llama")
    rows = prompts(model)
    ours = generate(model, rows, max_new_tokens=4, ends=())
    for row, new in zip(rows, ours, strict=True):
        theirs = model.network.generate(
            input_ids=torch.tensor([row]),
            attention_mask=torch.ones(1, len(row), dtype=torch.long),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tuple(theirs[0, len(row) :].tolist()) == new
    batch = pad(rows, side="left")
    theirs = model.network.generate(
        **{name: batch.arguments[name] for name in ("input_ids", "attention_mask")},
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert [tuple(row[-4:].tolist()) for row in theirs] == ours


def test_lm_eval_reads_each_request_by_its_own_prompt() -> None:
    from lm_eval.api.instance import Instance

    from editkit.evaluation.harness.lm import harness_model

    model = edited("gpt2")
    pairs = [(probe.prompt, f" {probe.answer}") for probe in probes()]
    wanted = [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=index)
        for index, pair in enumerate(pairs)
    ]
    together = harness_model(model, tokens_per_batch=512).loglikelihood(wanted, disable_tqdm=True)
    lm = harness_model(model, tokens_per_batch=1)
    alone = [lm.loglikelihood([each], disable_tqdm=True)[0] for each in wanted]
    assert [value for value, _ in together] == pytest.approx(
        [value for value, _ in alone], abs=1e-4
    )
    plain = [sum(plainly(model, probe)) for probe in probes()]
    assert [value for value, _ in together] == pytest.approx(plain, abs=1e-3)
    settings = {"until": [], "max_gen_toks": 4}
    asked = [
        Instance(request_type="generate_until", doc={}, arguments=(prompt, settings), idx=index)
        for index, (prompt, _) in enumerate(pairs)
    ]
    texts = harness_model(model, tokens_per_batch=4096).generate_until(asked)
    assert texts == [lm.generate_until([each])[0] for each in asked]


def test_without_a_side_and_on_prompts_that_none_covers_the_model_is_unedited_bit_for_bit() -> None:
    model = tiny_model("gptj")
    foreign = pad(encode_prompts(model.tokenizer, ["What does Shakira play?"]))
    with torch.no_grad():
        before = model.network(**foreign.arguments).logits
    session = Session(model, replace(GRACE, radius=1e-4))
    session.edit(request(0))
    asked = pad(encode_prompts(model.tokenizer, [request(0).full_prompt]))
    with torch.no_grad():
        assert torch.equal(model.network(**foreign.arguments).logits, before)
        after = model.network(**asked.arguments).logits
        assert not torch.equal(after, before)
        model.undo()
        assert not model.sides
        unedited = model.network(**asked.arguments).logits
        session.edit(request(0))
        assert torch.equal(model.network(**asked.arguments).logits, after), "the same seed again"
        model.reset()
        assert torch.equal(model.network(**asked.arguments).logits, unedited)


def test_routing_says_which_prompts_are_sent_to_a_side() -> None:
    model = edited("llama")
    rows = encode_prompts(model.tokenizer, [probe.prompt for probe in probes()])
    found = routed(model, rows)
    assert found == [routed(model, [row])[0] for row in rows]
    own = encode_prompts(model.tokenizer, [each.full_prompt for each in requests(3)])
    assert routed(model, own) == [True] * 3
    assert 0 < sum(found) < len(found)
    model.attach()
    assert routed(model, rows) == [False] * len(rows)
