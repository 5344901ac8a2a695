"""Hooks read and change the right tensors, end the pass early, and are removed afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.model.capture import add_to_matrix, add_to_output, capture
from editkit.model.editable import EditableModel
from editkit.model.tokens import PromptBatch, encode_prompts, pad
from tests.support.helpers import KINDS, tiny_model


def batch_of(model: EditableModel, *prompts: str) -> PromptBatch:
    return pad(encode_prompts(model.tokenizer, prompts or ("The capital of France is", "Apple's")))


def num_hooks(model: EditableModel) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for module in model.network.modules()
    )


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> EditableModel:
    return tiny_model(request.param)


def test_the_output_is_the_matrix_times_the_captured_input(model: EditableModel) -> None:
    module = model.family.down_projection(1)
    with (
        torch.no_grad(),
        capture(
            model, inputs=[module], outputs=[module, model.family.mlp(1), model.family.block(1)]
        ) as captured,
    ):
        model.final_hidden(batch_of(model))
    bias = getattr(model.module(module), "bias", None)
    expected_BTO = captured.inputs[module] @ model.weight(module).T + (0 if bias is None else bias)
    torch.testing.assert_close(captured.outputs[module], expected_BTO)
    torch.testing.assert_close(
        captured.outputs[model.family.mlp(1)], expected_BTO
    )  # dropout never runs
    assert captured.outputs[model.family.block(1)].shape == expected_BTO.shape
    assert num_hooks(model) == 0


def test_nothing_above_the_last_captured_module_is_computed(model: EditableModel) -> None:
    reached: list[str] = []
    module = model.family.down_projection(1)
    watched = {"own": module, "next": model.family.mlp(2), "below": model.family.mlp(0)}
    handles = [
        model.module(name).register_forward_hook(lambda *_, what=what: reached.append(what))
        for what, name in watched.items()
    ]
    with torch.no_grad(), capture(model, inputs=[module]) as captured:
        model.final_hidden(batch_of(model))
        reached.append("the rest of the block")
    assert reached == ["below"]  # the module whose input is captured does not run either
    assert captured.inputs[module].ndim == 3
    with torch.no_grad(), capture(model, inputs=[module], stop_after_last=False):
        model.final_hidden(batch_of(model))
    assert reached == ["below", "below", "own", "next"]
    for handle in handles:
        handle.remove()


def test_an_unknown_module_is_named_and_no_hook_remains(model: EditableModel) -> None:
    with (
        pytest.raises(ConfigError, match=r"nowhere: .* no such module"),
        capture(model, inputs=[model.family.mlp(0), "nowhere"]),
    ):
        pass
    assert num_hooks(model) == 0


def test_a_module_that_was_not_reached_is_an_error(model: EditableModel) -> None:
    with (
        pytest.raises(RuntimeError, match="did not reach"),
        capture(model, outputs=[model.family.mlp(0)]),
    ):
        pass
    with (
        pytest.raises(RuntimeError, match="did not reach"),
        add_to_output(model, model.family.mlp(0), torch.tensor([0]), torch.zeros(32)),
    ):
        pass


def test_hooks_are_removed_when_the_block_fails(model: EditableModel) -> None:
    with pytest.raises(ZeroDivisionError), capture(model, outputs=[model.family.mlp(0)]):
        raise ZeroDivisionError
    with (
        pytest.raises(ZeroDivisionError),
        add_to_output(model, model.family.mlp(0), torch.tensor([0]), torch.zeros(32)),
    ):
        raise ZeroDivisionError
    assert num_hooks(model) == 0


def test_adding_changes_one_position_per_row_and_gradients_reach_the_vector(
    model: EditableModel,
) -> None:
    mlp, batch = model.family.mlp(1), batch_of(model)
    columns = batch.columns([1, 0])
    delta_BO = torch.randn(2, 32, requires_grad=True)
    with torch.no_grad(), capture(model, outputs=[mlp]) as plain:
        model.final_hidden(batch)
    with (
        add_to_output(model, mlp, columns, delta_BO),
        capture(model, outputs=[mlp], stop_after_last=False) as moved,
    ):
        hidden_BTD = model.final_hidden(batch)
    expected_BTO = plain.outputs[mlp].clone()
    expected_BTO[torch.arange(2), columns] += delta_BO.detach()
    assert torch.equal(moved.outputs[mlp], expected_BTO)
    hidden_BTD[:, -1].square().sum().backward()
    assert delta_BO.grad is not None
    assert delta_BO.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.network.parameters())
    assert num_hooks(model) == 0


def test_one_vector_serves_all_rows_and_zeros_change_nothing(model: EditableModel) -> None:
    batch = batch_of(model)
    with torch.no_grad():
        plain_BTD = model.final_hidden(batch)
        with add_to_output(model, model.family.mlp(0), batch.columns([0, 0]), torch.zeros(32)):
            assert torch.equal(model.final_hidden(batch), plain_BTD)


def test_modules_that_return_tuples_are_handled() -> None:
    model = tiny_model("gpt2")
    batch, attention = batch_of(model), "transformer.h.0.attn"  # returns (output, weights)
    delta = torch.ones(32)
    with torch.no_grad(), capture(model, outputs=[attention]) as plain:
        model.final_hidden(batch)
    with (
        torch.no_grad(),
        add_to_output(model, attention, batch.columns([0, 0]), delta),
        capture(model, outputs=[attention]) as moved,
    ):
        model.final_hidden(batch)
    difference_BTD: Any = moved.outputs[attention] - plain.outputs[attention]
    assert difference_BTD[:, 0].allclose(delta)
    assert torch.equal(difference_BTD[:, 1:], torch.zeros_like(difference_BTD[:, 1:]))


def test_a_matrix_computes_as_if_it_were_edited(model: EditableModel) -> None:
    module, batch = model.family.down_projection(1), batch_of(model)
    update_OI = (torch.randn(model.weight(module).shape) * 0.1).requires_grad_()
    with add_to_matrix(model, module, update_OI):
        hidden_BTD = model.final_hidden(batch)
    hidden_BTD.sum().backward()
    assert update_OI.grad is not None
    assert num_hooks(model) == 0
    model.edit([module])
    model.apply(module, update_OI.detach())
    with torch.no_grad():
        torch.testing.assert_close(
            model.final_hidden(batch), hidden_BTD.detach(), rtol=1e-4, atol=1e-5
        )
