"""WISE: a search against a plain one, masks, shards, merges and routing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from editkit.api.session import Session
from editkit.editors.memories import Memories
from editkit.editors.wise import NEVER, Wise
from editkit.errors import OptionError
from editkit.linalg.ties import ties
from editkit.model.editable import EditableModel
from editkit.model.side_routes import routed
from editkit.model.tokens import encode_prompts, encode_with_targets, pad
from editkit.types import TensorState
from tests.support.helpers import Kind, request, requests, tiny_model
from tests.support.methods import noise
from tests.support.methods import step as step_of
from tests.support.sides import assert_each_sequence_is_routed_by_itself

WISE = Wise(
    name="wise",
    layers=(1,),
    matrix="down",
    context_lengths=((4, 1),),
    alpha=0.01,
    beta=0.2,
    gamma=0.1,
    act_ratio=0.8,
    mask_ratio=0.5,
    shard=10,
    merge_every=0,
    density=0.6,
    steps=4,
    lr=0.5,
    weight_decay=1e-3,
    norm_constraint=0.05,
    stop_loss=0.0,
    stop_change=0.0,
)
CONTEXTS = ("{}", "Paris is in France. {}")


def edited(model: EditableModel, editor: Wise, count: int, state: TensorState) -> TensorState:
    step = step_of(model, requests(count), CONTEXTS, state=state)
    return editor.propose(step, editor.plan(step))


def first_state(model: EditableModel, editor: Wise = WISE) -> TensorState:
    torch.manual_seed(1)
    return editor.init(model, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_memory_is_that_of_a_plain_descent(kind: Kind) -> None:
    model = tiny_model(kind)
    (module,) = WISE.modules(model)
    state = first_state(model)
    texts = [request(0).full_prompt, f"Paris is in France. {request(0).full_prompt}"]
    [foreign] = encode_prompts(model.tokenizer, ["Paris is in France."])
    weight = model.weight(module).clone()
    copy = weight.clone().requires_grad_()
    seen: list[torch.Tensor] = []

    def answered(_module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor):  # type: ignore[no-untyped-def]
        seen.append(args[0][0])
        return output + args[0] @ (copy - weight).T

    def distance(inputs: torch.Tensor) -> torch.Tensor:
        return torch.stack([(copy @ x - weight @ x).norm() for x in inputs]).mean()

    for _ in range(WISE.steps):
        losses, edits = [], []
        probes = [request(0).probe(prompt=text) for text in texts]
        for sequence in encode_with_targets(model.tokenizer, probes):
            with model.module(module).register_forward_hook(answered):
                ids = torch.tensor([sequence.ids[:-1]])
                logits = model.network(ids).logits[0, sequence.start - 1 :]
            losses.append(cross_entropy(logits, torch.tensor(sequence.target_ids)))
            edits.append(distance(seen[-1][: sequence.start].detach()))
        with torch.no_grad(), model.module(module).register_forward_hook(answered):
            model.network(torch.tensor([foreign]))
        other, both = distance(seen[-1].detach()), torch.stack(edits)
        loss = torch.stack(losses).mean() + (WISE.beta - both).relu().mean()
        loss = loss + (other - WISE.alpha).relu() + (other - both + WISE.gamma).relu().mean()
        loss = loss + WISE.weight_decay / 2 * copy.square().sum()
        [gradient] = torch.autograd.grad(loss, copy)
        moved = copy - WISE.lr * gradient * state["mask"]
        copy = (weight + (moved - weight).clamp(-0.05, 0.05)).detach().requires_grad_()
    found = edited(model, WISE, 1, state)
    assert torch.allclose(found["differences"][0], (copy - weight).detach(), atol=1e-5)
    inputs = seen[0][: len(encode_prompts(model.tokenizer, texts[:1])[0])]
    assert float(found["least"]) == pytest.approx(float(distance(inputs).detach()), rel=1e-4)
    assert not bool(found["differences"][0][~state["mask"]].any()), "outside the mask"
    assert bool((found["differences"].abs() <= 0.05).all())
    assert not model.sides


def test_memories_are_closed_after_a_shard_and_merged_or_kept() -> None:
    model = tiny_model("gpt2")
    editor = replace(WISE, shard=1, steps=2)
    kept = edited(model, editor, 3, first_state(model, editor))
    assert kept["counts"].tolist() == [1, 1, 1, 0]
    assert (kept["least"] < NEVER).tolist() == [True, True, True, False]
    merging = replace(editor, merge_every=2)
    merged = edited(model, merging, 3, first_state(model, merging))
    assert merged["counts"].tolist() == [2, 1, 0]
    expected = ties(kept["differences"][:2], 0.6)
    assert torch.allclose(merged["differences"][0], expected, atol=1e-6)
    assert float(merged["least"][0]) == pytest.approx(float(kept["least"][:2].min()))
    empty = first_state(model)
    (side,) = WISE.attach(model, empty)
    model.attach(side)
    [row] = encode_prompts(model.tokenizer, [request(0).full_prompt])
    assert routed(model, [row]) == [False], "a memory without edits answers nothing"


def test_ties_is_the_mean_of_the_entries_that_agree_with_the_elected_sign() -> None:
    updates = noise(3, 4, 5, seed=0)
    updates[2] *= 3
    kept = round(0.6 * 20)
    trimmed = [
        torch.where(update.abs() >= update.abs().flatten().sort(descending=True).values[kept - 1],
                    update, 0.0)
        for update in updates
    ]  # fmt: skip
    for row in range(4):
        for column in range(5):
            values = [float(update[row, column]) for update in trimmed]
            sign = math.copysign(1, sum(values)) if sum(values) else 0
            agreeing = [value for value in values if value * sign > 0]
            mean = sum(agreeing) / len(agreeing) if agreeing else 0.0
            assert float(ties(updates, 0.6)[row, column]) == pytest.approx(mean)


def test_a_prompt_goes_to_the_memory_that_moves_it_most_above_its_own_threshold() -> None:
    model = tiny_model("llama")
    (module,) = WISE.modules(model)
    rows, columns = model.weight(module).shape
    [ids] = encode_prompts(model.tokenizer, [request(0).full_prompt])
    differences = 0.01 * noise(2, rows, columns, seed=4).float()
    differences[1] *= 2

    def side(least: list[float]) -> Memories:
        return Memories(
            module=module,
            act_ratio=0.5,
            differences_KOI=differences,
            least_K=torch.tensor(least),
        )

    for least, is_sent in [([0.0, 0.0], True), ([0.0, 1e9], False), ([1e9, 0.0], True)]:
        model.attach(side(least))
        assert routed(model, [ids]) == [is_sent], "the largest distance alone counts"
    model.attach(side([0.0, 0.0]))
    batch = pad([ids])
    with torch.no_grad():
        logits = model.network(**batch.arguments).logits
        model.attach()
        model.edit([module])
        model.apply(module, differences[1])
        assert torch.allclose(model.network(**batch.arguments).logits, logits, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj"])
def test_each_sequence_is_routed_by_itself(kind: Kind) -> None:
    model = tiny_model(kind)
    session = Session(model, replace(WISE, shard=2, steps=6))
    for each in requests(3):
        session.edit(each)
    assert_each_sequence_is_routed_by_itself(model)


def test_options_out_of_range_are_named_together() -> None:
    with pytest.raises(OptionError) as raised:
        replace(WISE, layers=(), lr=0.0, density=1.5, alpha=-1.0, merge_every=15)
    named = [problem.partition(":")[0] for problem in raised.value.problems]
    assert named == ["lr", "layers", "density", "alpha", "merge_every"]
