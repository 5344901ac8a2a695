"""MEMoE: the bypass and its training against plain computations; anchors; every sequence by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from editkit.api.session import Session
from editkit.editors.anchors import Anchors
from editkit.editors.bypass import Bypass
from editkit.editors.memoe import Memoe, balance_loss
from editkit.errors import OptionError
from editkit.model.editable import EditableModel
from editkit.model.side_routes import routed
from editkit.model.tokens import encode_prompts, encode_with_targets, pad
from editkit.types import TensorState
from tests.support.helpers import Kind, requests, tiny_model
from tests.support.methods import step as step_of
from tests.support.sides import assert_each_sequence_is_routed_by_itself

MEMOE = Memoe(
    name="memoe",
    layers=(1,),
    matrix="down",
    experts=3,
    top_k=1,
    weight=0.7,
    anchors="subject",
    scope="all",
    noise=0.0,
    balance=0.1,
    expert_std=0.5,
    router_std=0.5,
    steps=6,
    lr=0.02,
    stop_loss=0.0,
)


def first_state(model: EditableModel, editor: Memoe) -> TensorState:
    torch.manual_seed(3)
    return editor.init(model, None)  # type: ignore[arg-type]


def edited_by(model: EditableModel, editor: Memoe, state: TensorState) -> TensorState:
    step = step_of(model, requests(3), state=state)
    return editor.propose(step, editor.plan(step))


def plain_gates(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    shares = logits.softmax(-1)
    order = shares.argsort(descending=True)
    return torch.stack(
        [share if e in order[:top_k] else 0 * share for e, share in enumerate(shares)]
    )


@pytest.mark.parametrize(("kind", "top_k"), [("gpt2", 1), ("llama", 2), ("gptj", 3)])
def test_the_forward_pass_is_equations_9_to_12_token_by_token(kind: Kind, top_k: int) -> None:
    model = tiny_model(kind)
    editor = replace(MEMOE, top_k=top_k, steps=2)
    state = edited_by(model, editor, first_state(model, editor))
    (side,) = editor.attach(model, state)
    assert isinstance(side, Bypass)
    (module,) = editor.modules(model)
    prompt = requests(1)[0].full_prompt
    [ids] = encode_prompts(model.tokenizer, [prompt])
    anchor = side.anchors.find(ids)
    assert model.tokenizer.decode(list(anchor)).strip() == requests(1)[0].subject
    embedded = model.network.get_input_embeddings().weight[list(anchor)].mean(0)
    seen: dict[str, torch.Tensor] = {}

    def read(_module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen["x"], seen["h"] = args[0][0], output[0]

    with torch.no_grad():
        with model.module(module).register_forward_hook(read):
            model.network(torch.tensor([ids]))
        inputs, outputs = seen["x"], seen["h"]
        for x, h in zip(inputs, outputs, strict=True):
            gates = plain_gates(state["router"] @ torch.cat([x, embedded]), top_k)
            h += 0.7 * sum(g * (w @ x) for g, w in zip(gates, state["experts"], strict=True))
        model.attach(side)
        with model.module(module).register_forward_hook(read):
            model.network(torch.tensor([ids]))
    assert torch.allclose(seen["h"], outputs, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_experts_and_router_are_those_of_a_plain_descent(kind: Kind) -> None:
    model = tiny_model(kind)
    (module,) = MEMOE.modules(model)
    state = first_state(model, MEMOE)
    asked = requests(3)
    router, experts = (state[name].clone().requires_grad_() for name in ("router", "experts"))
    adam = torch.optim.Adam([router, experts], lr=MEMOE.lr)
    encoded = encode_with_targets(model.tokenizer, [each.probe() for each in asked])
    anchors = Anchors.of(model, "subject").with_subjects(model, asked)
    table = model.network.get_input_embeddings().weight
    shares: list[torch.Tensor] = []

    def bypassed(anchor: torch.Tensor):  # type: ignore[no-untyped-def]
        def hook(_module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor):  # type: ignore[no-untyped-def]
            rows = []
            for x in args[0][0]:
                logits = router @ torch.cat([x, anchor])
                shares.append(logits.softmax(-1))
                gates = plain_gates(logits, 1)
                rows.append(0.7 * torch.einsum("e,eoi,i->o", gates, experts, x))
            return output + torch.stack(rows)[None]

        return hook

    for _ in range(MEMOE.steps):
        losses = []
        shares.clear()
        for sequence in encoded:
            ids, start = list(sequence.ids[:-1]), sequence.start
            anchor = table[list(anchors.find(tuple(ids[:start])))].mean(0)
            with model.module(module).register_forward_hook(bypassed(anchor)):
                logits_TV = model.network(**pad([ids]).arguments).logits[0, start - 1 :]
            losses.append(cross_entropy(logits_TV, torch.tensor(sequence.target_ids)))
        every = torch.stack(shares)
        counts = torch.stack([(every.argmax(1) == e).float().mean() for e in range(3)])
        loss = torch.stack(losses).mean() + 0.1 * 3 * (counts * every.mean(0)).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    found = edited_by(model, MEMOE, state)
    assert torch.allclose(found["experts"], experts.detach(), atol=2e-4)
    assert torch.allclose(found["router"], router.detach(), atol=2e-4)
    assert not torch.equal(found["experts"], state["experts"]), "a state is a value"
    assert not model.sides, "planning leaves the model as it was"


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj"])
def test_each_sequence_is_routed_by_itself(kind: Kind) -> None:
    model = tiny_model(kind)
    editor = replace(MEMOE, anchors="entities" if kind == "llama" else "subject", expert_std=0.0)
    Session(model, editor).edit(requests(3))
    assert_each_sequence_is_routed_by_itself(model)


def test_experts_of_zeros_leave_the_model_as_it_is() -> None:
    model = tiny_model("gpt2")
    editor = replace(MEMOE, expert_std=0.0)
    (side,) = editor.attach(model, first_state(model, editor))
    asked = pad(encode_prompts(model.tokenizer, [requests(1)[0].full_prompt]))
    with torch.no_grad():
        before = model.network(**asked.arguments).logits
        model.attach(side)
        assert torch.equal(model.network(**asked.arguments).logits, before)


def test_all_prompts_pass_the_experts_unless_the_scope_is_that_of_the_anchors() -> None:
    model = tiny_model("llama")
    texts = [requests(1)[0].full_prompt, "What does Shakira play?"]
    rows = encode_prompts(model.tokenizer, texts)
    foreign = pad(rows[1:])
    with torch.no_grad():
        before = model.network(**foreign.arguments).logits
        Session(model, MEMOE).edit(requests(3))
        assert routed(model, rows) == [True, True]
        assert not torch.equal(model.network(**foreign.arguments).logits, before)
        model.reset()
        Session(model, replace(MEMOE, scope="anchored")).edit(requests(3))
        assert routed(model, rows) == [True, False]
        assert torch.equal(model.network(**foreign.arguments).logits, before)


def test_the_auxiliary_loss_is_1_for_an_even_spread_and_grows_to_the_number_of_experts() -> None:
    assert float(balance_loss(torch.eye(4))) == pytest.approx(1.0)
    assert float(balance_loss(torch.eye(4)[[0, 0, 0]])) == pytest.approx(4.0)


def test_an_anchor_is_the_longest_known_subject_with_and_without_a_blank_before_it() -> None:
    model = tiny_model("gpt2")
    first = requests(1)[0]
    longer = replace(first, subject=f"{first.subject} Tower")
    anchors = Anchors.of(model, "subject").with_subjects(model, [first, longer])
    for text, subject in [
        (f"{first.subject} is", first.subject),
        (f"They say that {first.subject} is", first.subject),
        (f"They say that {longer.subject} is", longer.subject),
    ]:
        [ids] = encode_prompts(model.tokenizer, [text])
        assert model.tokenizer.decode(list(anchors.find(ids))).strip() == subject
    [ids] = encode_prompts(model.tokenizer, ["What does Shakira play?"])
    assert anchors.find(ids) == ()
    again = anchors.with_subjects(model, [first])
    assert torch.equal(again.subjects_NL, anchors.subjects_NL), "each form is kept once"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_entities_are_words_with_a_capital_but_not_a_sentences_first_word(kind: Kind) -> None:
    model = tiny_model(kind)
    anchors = Anchors.of(model, "entities")
    for text, entities in [
        ("The mother tongue of Danielle Darrieux is", ["Danielle", "Darrieux"]),
        ("Shakira plays the", ["Shakira"]),
        ("Danielle Darrieux lives in Paris", ["Danielle", "Darrieux", "Paris"]),
        ("nothing here is a name", []),
    ]:
        [ids] = encode_prompts(model.tokenizer, [text])
        found = [model.tokenizer.decode([token]).strip() for token in anchors.find(ids)]
        assert "".join(found) == "".join(entities)


def test_options_out_of_range_are_named_together() -> None:
    with pytest.raises(OptionError) as raised:
        replace(
            MEMOE, layers=(), experts=2, top_k=3, lr=0.0, noise=-1.0, scope="anchored",
            anchors="none",
        )  # fmt: skip
    named = [problem.partition(":")[0] for problem in raised.value.problems]
    assert named == ["lr", "layers", "noise", "top_k", "scope"]
