"""T-Patcher: a search against a plain one, where patches act, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from editkit.api.session import Session
from editkit.editors.patches import Patches
from editkit.editors.t_patcher import TPatcher
from editkit.errors import ConfigError, OptionError
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.model.editable import EditableModel
from editkit.model.shortcuts import Comparison, Shortcuts
from editkit.model.side_routes import routed
from editkit.model.tokens import encode_prompts, encode_with_targets
from editkit.types import EditRequest, TensorState
from tests.support.helpers import Kind, request, requests, tiny_model
from tests.support.methods import step as step_of
from tests.support.sides import assert_each_sequence_is_routed_by_itself

T_PATCHER = TPatcher(
    name="t_patcher",
    layers=None,
    activation="relu",
    patches="all",
    background=((5, 2),),
    pool=10,
    memory_top=4,
    act_weight=1.0,
    memory_weight=5.0,
    beta=3.0,
    gamma=3.0,
    steps=3,
    lr=0.01,
    stop_loss=0.0,
)
CONTEXTS = ("{}", "Paris is in France. {}", "The guitar. {}")
PLAIN = Shortcuts(
    comparisons=(Comparison(shortcut="search", differences={"x": 1.0}, tolerance=0.0),)
)


def edited(
    model: EditableModel, asked: list[EditRequest], editor: TPatcher = T_PATCHER
) -> TensorState:
    state = editor.init(model, None)  # type: ignore[arg-type]
    step = step_of(model, asked, CONTEXTS, state=state, pool=(request(2),))
    return editor.propose(step, editor.plan(step))


def side_of(model: EditableModel, state: TensorState, editor: TPatcher = T_PATCHER) -> Patches:
    (side,) = editor.attach(model, state)
    assert isinstance(side, Patches)
    return side


@pytest.mark.parametrize(("kind", "cached"), [("gpt2", True), ("llama", True), ("gptj", False)])
def test_the_patches_are_those_of_a_plain_descent(kind: Kind, cached: bool) -> None:
    model = tiny_model(kind)
    if not cached:
        model.shortcuts = PLAIN
    found = edited(model, [request(0)])
    mlp = model.module(model.family.mlp(model.num_layers - 1))
    seen: list[torch.Tensor] = []
    learned: list[torch.Tensor] = []

    def changed(_module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor):  # type: ignore[no-untyped-def]
        seen.append(args[0][0].detach())
        if not learned:
            return None
        keys, biases, values = learned
        patched = output.clone()
        patched[0, start:] += (args[0][0, start:] @ keys.T + biases).relu() @ values
        return patched

    def run(ids: tuple[int, ...]) -> torch.Tensor:
        with mlp.register_forward_hook(changed):
            logits: torch.Tensor = model.network(torch.tensor([ids])).logits[0]
        return logits

    [sequence] = encode_with_targets(model.tokenizer, [request(0).probe()])
    start = sequence.start - 1
    texts = [context.removesuffix(" {}") for context in CONTEXTS[1:]]
    for ids in encode_prompts(model.tokenizer, texts):
        run(ids)
    [ids] = encode_prompts(model.tokenizer, [request(2).full_prompt])
    run(ids)
    memories = torch.cat([*seen[:-1], seen[-1][-1:]])
    run(sequence.ids[:-1])
    own = seen[-1][start:]
    assert torch.allclose(found["memories"], torch.cat([memories, own]), atol=1e-5)
    learned = [own / own.square().sum(1, keepdim=True), own.new_zeros(len(own)), 0 * own]
    learned = [tensor.clone().requires_grad_() for tensor in learned]
    adam = torch.optim.Adam(learned, lr=0.01)
    for _ in range(T_PATCHER.steps):
        logits = run(sequence.ids[:-1])[start:]
        keys, biases, _values = learned
        signals = own @ keys.T + biases
        loss = cross_entropy(logits, torch.tensor(sequence.target_ids))
        for n in range(len(own)):
            largest = (memories @ keys[n] + biases[n]).sort(descending=True).values[:4]
            apart = (largest + 3).exp().mean() + (largest - signals[n, n] + 3).exp().mean()
            loss = loss + ((-signals[n, n]).exp() + 5 * apart) / len(own)
        adam.zero_grad()
        loss.backward()
        adam.step()
    for name, tensor in zip(("keys", "biases", "values"), learned, strict=True):
        assert torch.allclose(found[name], tensor, atol=1e-4), name
    assert not model.sides


def test_only_wrong_tokens_get_patches_and_an_edit_that_is_right_gets_none() -> None:
    model = tiny_model("llama")
    editor = replace(T_PATCHER, patches="wrong", steps=60, lr=0.1, background=())
    session, probe = Session(model, editor), request(0).probe()
    session.edit(request(0))
    assert score(model, [probe], tokens_per_batch=64)[probe].is_greedy
    entries = model.sides[0].figures()["entries"]
    assert 1 <= entries <= len(encode_with_targets(model.tokenizer, [request(0).probe()])[0].ids)
    session.edit(request(0))
    assert model.sides[0].figures()["entries"] == entries


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj"])
def test_each_sequence_is_patched_by_itself(kind: Kind) -> None:
    model = tiny_model(kind)
    session = Session(model, replace(T_PATCHER, steps=40, lr=0.03))
    for each in requests(3):
        session.edit(each)
    assert_each_sequence_is_routed_by_itself(model)


def test_a_text_at_which_no_patch_fires_has_the_unedited_numbers_bit_for_bit() -> None:
    model = tiny_model("gpt2")
    side = side_of(model, edited(model, requests(2)))
    silent = replace(side, biases_N=torch.full_like(side.biases_N, -1e3))
    probe = request(0).probe()
    before = score(model, [probe], tokens_per_batch=64)[probe].log_probs
    model.attach(silent)
    assert score(model, [probe], tokens_per_batch=64)[probe].log_probs == before
    rows = encode_prompts(model.tokenizer, [each.full_prompt for each in requests(2)])
    assert routed(model, rows) == [False] * 2
    model.attach(side)
    assert score(model, [probe], tokens_per_batch=64)[probe].log_probs != before


def test_options_out_of_range_are_named_together() -> None:
    with pytest.raises(OptionError) as raised:
        replace(T_PATCHER, layers=(0, 1), steps=0, act_weight=-1.0, beta=float("nan"))
    named = [problem.partition(":")[0] for problem in raised.value.problems]
    assert named == ["steps", "layers", "act_weight", "beta"]
    with pytest.raises(ConfigError, match="does not have these layers"):
        replace(T_PATCHER, layers=(99,)).modules(tiny_model("gpt2"))
