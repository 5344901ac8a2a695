"""MEMOIR: a search against a plain one, masks and routing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from editkit.api.session import Session
from editkit.editors.masked_memory import MaskedMemory
from editkit.editors.memoir import Memoir
from editkit.errors import ConfigError, OptionError
from editkit.model.editable import EditableModel
from editkit.model.side_routes import routed
from editkit.model.tokens import encode_prompts, encode_with_targets
from editkit.types import EditRequest, TensorState
from tests.support.helpers import Kind, request, requests, tiny_model
from tests.support.methods import noise
from tests.support.methods import step as step_of
from tests.support.sides import assert_each_sequence_is_routed_by_itself

MEMOIR = Memoir(
    name="memoir",
    layers=(1,),
    matrix="down",
    columns=8,
    least_overlap=0.9,
    background=((5, 2),),
    steps=4,
    lr=2.0,
    weight_decay=1e-3,
    clip=0.05,
    stop_loss=0.0,
)
CONTEXTS = ("{}", "Paris is in France. {}", "The guitar. {}")


def edited(model: EditableModel, asked: list[EditRequest], editor: Memoir = MEMOIR) -> TensorState:
    torch.manual_seed(2)
    state = editor.init(model, None)  # type: ignore[arg-type]
    step = step_of(model, asked, CONTEXTS, state=state)
    return editor.propose(step, editor.plan(step))


def side_of(model: EditableModel, state: TensorState, editor: Memoir = MEMOIR) -> MaskedMemory:
    (side,) = editor.attach(model, state)
    assert isinstance(side, MaskedMemory)
    return side


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_memory_is_that_of_a_plain_descent_on_the_masks_columns(kind: Kind) -> None:
    model = tiny_model(kind)
    (module,) = MEMOIR.modules(model)
    found = edited(model, [request(0)])
    [sequence] = encode_with_targets(model.tokenizer, [request(0).probe()])
    seen: list[torch.Tensor] = []
    rows, width = model.weight(module).shape
    memory, mask = torch.zeros(rows, width), torch.zeros(width)

    def added(_module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor):  # type: ignore[no-untyped-def]
        seen.append(args[0][0].detach())
        return output + (args[0] * mask) @ memory.T

    def run(ids: tuple[int, ...]) -> torch.Tensor:
        with model.module(module).register_forward_hook(added):
            logits: torch.Tensor = model.network(torch.tensor([ids])).logits[0]
        return logits

    texts = [context.removesuffix(" {}") for context in CONTEXTS[1:]]
    for ids in encode_prompts(model.tokenizer, texts):
        run(ids)
    common = torch.stack([inputs.mean(0) for inputs in seen]).mean(0)
    run(sequence.ids[: sequence.start])
    order = (seen[-1].mean(0) - common).abs().argsort(descending=True)
    mask[found["order"][order[: MEMOIR.columns]]] = 1
    for _ in range(MEMOIR.steps):
        memory.requires_grad_()
        logits = run(sequence.ids[:-1])[sequence.start - 1 :]
        loss = cross_entropy(logits, torch.tensor(sequence.target_ids))
        [gradient] = torch.autograd.grad(loss, memory)
        gradient = gradient + MEMOIR.weight_decay * memory.detach()
        gradient = gradient * min(1.0, MEMOIR.clip / float(gradient.norm()))
        memory = memory.detach() - MEMOIR.lr * gradient
    assert torch.allclose(found["memory"], memory, atol=1e-5)
    assert not bool(found["memory"][:, mask == 0].any())
    assert sorted(found["masks"][0].tolist()) == mask.nonzero()[:, 0].tolist()
    assert not model.sides


def test_a_prompt_takes_the_mask_that_it_shares_most_of_if_that_is_enough() -> None:
    model = tiny_model("gpt2")
    asked = [*requests(3), request(0)]
    side = side_of(model, edited(model, asked))
    assert len(side.masks_NK) == 3, "the same prompt again takes its entry's place"
    means_PI = noise(20, side.memory_OI.shape[1], seed=3).float()
    masks_PK = side.masks(means_PI)
    plain = [
        [len({*row.tolist()} & {*mask.tolist()}) / 8 for mask in side.masks_NK] for row in masks_PK
    ]
    assert torch.allclose(side.overlaps(masks_PK), torch.tensor(plain))
    rows = encode_prompts(model.tokenizer, [each.full_prompt for each in requests(3)])
    foreign = encode_prompts(model.tokenizer, ["What does Shakira play?"])
    model.attach(side)
    assert routed(model, [*rows, *foreign]) == [True, True, True, False]
    model.attach(replace(side, least_overlap=1.1))
    assert routed(model, rows) == [False] * 3
    empty = side_of(model, MEMOIR.init(model, None))  # type: ignore[arg-type]
    model.attach(empty)
    assert routed(model, rows) == [False] * 3


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj"])
def test_each_sequence_is_routed_by_itself(kind: Kind) -> None:
    model = tiny_model(kind)
    session = Session(model, replace(MEMOIR, least_overlap=0.6, clip=1.0))
    for each in requests(3):
        session.edit(each)
    assert_each_sequence_is_routed_by_itself(model)


def test_options_out_of_range_are_named_together() -> None:
    with pytest.raises(OptionError) as raised:
        replace(MEMOIR, layers=(0, 1), clip=0.0, least_overlap=2.0, background=())
    named = [problem.partition(":")[0] for problem in raised.value.problems]
    assert named == ["clip", "layers", "least_overlap", "background"]
    with pytest.raises(ConfigError, match="a mask has more columns than"):
        replace(MEMOIR, columns=10**6).modules(tiny_model("gpt2"))
