from __future__ import annotations

from typing import Any

import pytest
import torch

from editkit.editors.ft import Ft, log_probabilities
from editkit.errors import ConfigError
from editkit.model.editable import EditableModel
from editkit.model.tokens import encode_with_target
from editkit.types import EditRequest
from tests.support.helpers import KINDS, request, requests, tiny_model
from tests.support.methods import step

OBJECTIVES = ("target", "prompt_last")


def ft(**changes: Any) -> Ft:
    options: dict[str, Any] = {
        "name": "ft",
        "layers": (1,),
        "objective": "target",
        "steps": 5,
        "lr": 0.01,
        "norm_constraint": 0.02,
        "stop_loss": 0.0,
        "l1": 0.0,
        "l2": 0.0,
    } | changes
    return Ft(**options)


def plan_of(model: EditableModel, editor: Ft, asked: list[EditRequest]) -> Any:
    return editor.plan(step(model, asked, editor.contexts(model, torch.Generator())))


def propose(
    model: EditableModel, editor: Ft, asked: list[EditRequest], module: str, plan: Any
) -> torch.Tensor:
    return editor.propose(step(model, asked), module, plan)  # type: ignore[arg-type]


def plain_loss(model: EditableModel, asked: list[EditRequest], objective: str) -> torch.Tensor:
    """Mean over requests of the mean over target tokens, one forward pass each, all logits."""
    losses = []
    for each in asked:
        sequence = encode_with_target(model.tokenizer, each.full_prompt, each.target)
        logits = model.network(torch.tensor([sequence.ids])).logits[0].log_softmax(dim=-1)
        places = [
            sequence.start - 1 + (offset if objective == "target" else 0)
            for offset in range(len(sequence.target_ids))
        ]
        losses.append(
            -torch.stack(
                [
                    logits[place, token]
                    for place, token in zip(places, sequence.target_ids, strict=True)
                ]
            ).mean()
        )
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_the_plain_one(kind: Any, objective: Any) -> None:
    model = tiny_model(kind)
    with torch.no_grad():
        found = -log_probabilities(model, requests(), objective)().mean()
        assert float(found) == pytest.approx(
            float(plain_loss(model, requests(), objective)), rel=1e-5
        )


def test_the_two_objectives_agree_on_the_first_token_alone() -> None:
    model = tiny_model("gpt2")
    sequence = encode_with_target(model.tokenizer, request().full_prompt, request().target)
    assert len(sequence.target_ids) > 1
    first, flawed = (
        float(log_probabilities(model, [request()], objective)()) for objective in OBJECTIVES
    )
    assert first != pytest.approx(flawed, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_update_is_what_adam_does_to_the_matrix_itself(kind: Any, objective: Any) -> None:
    model, plain = tiny_model(kind), tiny_model(kind)
    editor = ft(objective=objective)
    (module,) = editor.modules(model)
    update = propose(model, editor, requests(), module, plan_of(model, editor, requests()))
    parameter = plain.module(module).weight.requires_grad_()
    before = parameter.detach().clone()
    adam = torch.optim.Adam([parameter], lr=0.01)
    for _ in range(5):
        adam.zero_grad()
        plain_loss(plain, requests(), objective).backward()
        adam.step()
        with torch.no_grad():
            parameter.copy_(before + (parameter - before).clamp(-0.02, 0.02))
    wanted = plain.weight(module) - (before.T if kind == "gpt2" else before)
    # Adam's first steps turn tiny gradients into whole steps, so rounding may flip single entries.
    assert float((update - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_elastic_net_is_added_to_the_loss(kind: Any) -> None:
    model, plain = tiny_model(kind), tiny_model(kind)
    # The net has to outweigh Adam's few steps to show.
    editor = ft(steps=3, l1=0.03, l2=2.0, norm_constraint=None)
    (module,) = editor.modules(model)
    plan = plan_of(model, editor, requests())
    parameter = plain.module(module).weight.requires_grad_()
    before = parameter.detach().clone()
    adam = torch.optim.Adam([parameter], lr=0.01)
    for number in range(4):
        moved = parameter - before
        loss = (
            plain_loss(plain, requests(), "target")
            + 0.03 * moved.abs().sum()
            + 2.0 * moved.square().sum()
        )
        if number == 3:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert plan.summary["loss"] == pytest.approx(loss.item(), rel=1e-3)
    wanted = plain.weight(module) - (before.T if kind == "gpt2" else before)
    assert float((plan.updates[module] - wanted).norm() / wanted.norm()) < 2e-2


def test_each_half_of_the_elastic_net_shortens_its_own_norm_over_all_matrices() -> None:
    def norms(**changes: float) -> tuple[float, float]:
        updates = plan_of(
            tiny_model("gpt2"),
            ft(layers=(0, 2), steps=20, norm_constraint=None, **changes),
            requests(),
        ).updates.values()
        return sum(float(each.abs().sum()) for each in updates), sum(
            float(each.square().sum()) for each in updates
        )

    free, lasso, ridge = norms(), norms(l1=0.002), norms(l2=0.5)
    assert lasso[0] < 0.8 * free[0]
    assert ridge[1] < 0.8 * free[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_reads_the_weights_and_keeps_within_the_bound(kind: Any, objective: Any) -> None:
    model, editor = tiny_model(kind), ft(objective=objective, layers=(0, 2))
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    plan = plan_of(model, editor, requests())
    for module in editor.modules(model):
        update = propose(model, editor, requests(), module, plan)
        assert update.shape == model.weight(module).shape and update.dtype == torch.float32
        assert 0 < float(update.abs().max()) <= 0.02
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items()
    )
    assert not any(parameter.requires_grad for parameter in model.network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_applied_update_gives_the_probability_that_the_plan_promised(kind: Any) -> None:
    model, editor = tiny_model(kind), ft()
    model.edit(editor.modules(model))
    plan = plan_of(model, editor, requests())
    for module in editor.modules(model):
        model.apply(module, propose(model, editor, requests(), module, plan))
    with torch.no_grad():
        after = float(log_probabilities(model, requests(), "target")().exp().mean())
    assert after == pytest.approx(plan.summary["probability_after"], rel=1e-4)
    assert plan.summary["probability_after"] > 1.2 * plan.summary["probability_before"]
    assert plan.summary["steps"] == 5 and plan.nonfinite is None


def test_the_bound_lies_around_the_weights_at_the_call() -> None:
    model, editor = tiny_model("gpt2"), ft(norm_constraint=0.005)
    (module,) = editor.modules(model)
    model.edit([module])
    for _ in range(3):
        model.apply(
            module, propose(model, editor, requests(), module, plan_of(model, editor, requests()))
        )
    assert float(model.total(module).dense().abs().max()) > 0.006


def test_no_bound_is_a_choice() -> None:
    model, editor = tiny_model("gpt2"), ft(norm_constraint=None, steps=8)
    (module,) = editor.modules(model)
    assert float(plan_of(model, editor, requests()).updates[module].abs().max()) > 0.03


def test_it_stops_as_soon_as_the_loss_is_low_enough() -> None:
    model = tiny_model("gpt2")
    plan = plan_of(model, ft(stop_loss=1e9), requests())
    assert plan.summary["steps"] == 0 and not plan.updates[ft().modules(model)[0]].any()
    loss = plan_of(model, ft(steps=2), requests()).summary["loss"]
    assert plan_of(model, ft(steps=50, stop_loss=loss + 1e-4), requests()).summary["steps"] == 2


def test_a_loss_that_is_no_number_is_told_and_nothing_is_written() -> None:
    model = tiny_model("gpt2")
    (module,) = ft().modules(model)
    model.module(module).weight.data[0, 0] = torch.nan
    plan = plan_of(model, ft(), requests())
    assert plan.nonfinite == "loss" and not plan.updates[module].any()


def test_the_same_call_twice_gives_the_same_bits() -> None:
    first, second = (plan_of(tiny_model("llama"), ft(), requests()).updates for _ in range(2))
    assert all(torch.equal(first[module], second[module]) for module in first)


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(
        ConfigError,
        match=r"(?s)lr:.*layers:.*norm_constraint:.*l1:.*l2:",
    ):
        ft(lr=0.0, layers=(1, 1), norm_constraint=-1.0, l1=-1.0, l2=float("inf"))
