"""CrispEdit: the projection against the dense Kronecker product, both orders, sums, resuming."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from editkit.editors.crispedit import CrispEdit
from editkit.editors.curvature import Curvature, curvature, text_sequences
from editkit.errors import ConfigError, OptionError
from editkit.linalg.kronecker import low_curvature
from editkit.model.editable import EditableModel
from editkit.runner.checkpoint import RunState
from editkit.runner.loop import run_edits
from editkit.stats.store import Moments
from tests.support.fakes import trajectory
from tests.support.helpers import SENTENCES, requests, tiny_model
from tests.support.methods import model_moments, relative, second_moment, step


def crispedit(**changes: Any) -> CrispEdit:
    options: dict[str, Any] = {
        "name": "crispedit",
        "layers": (1,),
        "epochs": 3,
        "mini_batch": 2,
        "lr": 0.01,
        "stop_loss": 0.0,
        "energy": 0.5,
        "order": "step",
        "texts": 4,
        "text_length": 12,
    } | changes
    return CrispEdit(**options)


def plan_of(model: EditableModel, editor: CrispEdit, asked: Any) -> tuple[Any, Any]:
    moments = model_moments(model, editor.modules(model))
    state = editor.init(model, moments)
    return editor.plan(step(model, asked, state=state, moments=moments)), state


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_the_projection_is_that_of_the_dense_kronecker_product(energy: float) -> None:
    a, b = second_moment(6, seed=1), second_moment(4, seed=2)
    matrix = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values, vectors = torch.linalg.eigh(torch.kron(b, a))  # of the matrix, row by row
    held = values.flip(0).cumsum(0) / values.sum()
    threshold = values.flip(0)[int((held < energy).sum())]
    low = vectors[:, values < threshold * (1 - 1e-9)]
    wanted = (low @ (low.T @ matrix.flatten())).reshape(4, 6)
    projection = low_curvature(a, b, energy)
    assert 0 < int(projection.is_low_OI.sum()) < 24
    torch.testing.assert_close(projection(matrix), wanted)
    torch.testing.assert_close(projection(projection(matrix)), projection(matrix))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_sums_are_those_of_single_tokens(kind: Any) -> None:
    """One text a pass, the loss over all logits, plain autograd."""
    model = tiny_model(kind)
    modules = model.down_projections((0, 1))
    texts = [*SENTENCES[:2], *(["x"] if kind == "gpt2" else [])]  # with a BOS, x is two tokens
    found = curvature(model, modules, text_sequences(model, texts, 9))
    for module in modules:
        inputs, gradients, tokens = 0.0, 0.0, 0
        for text in SENTENCES[:2]:
            seen: dict[str, torch.Tensor] = {}

            def hook(_: Any, given: Any, output: torch.Tensor, seen: Any = seen) -> torch.Tensor:
                seen["x"], seen["y"] = given[0][0].detach(), output.requires_grad_()
                return output

            handle = model.module(module).register_forward_hook(hook)
            ids = torch.tensor([model.tokenizer(text)["input_ids"][:9]])
            with torch.enable_grad():
                logits = model.network(ids).logits[0].log_softmax(dim=-1)
                loss = -logits[torch.arange(8), ids[0, 1:]].sum()
                (gradient,) = torch.autograd.grad(loss, [seen["y"]])
            handle.remove()
            x, g = seen["x"][:8].double(), gradient[0, :8].double()
            inputs, gradients, tokens = inputs + x.T @ x, gradients + g.T @ g, tokens + 8
        own = found[module]
        assert own.tokens == tokens
        assert relative(own.inputs_II, inputs) < 1e-5  # type: ignore[arg-type]
        assert relative(own.gradients_OO, gradients) < 1e-5  # type: ignore[arg-type]


def test_only_the_papers_order_keeps_the_update_out_of_protected_directions() -> None:
    model, asked = tiny_model("gpt2"), requests(3)
    shares = {}
    for order in ("step", "gradient"):
        editor = crispedit(order=order)
        (module,) = editor.modules(model)
        plan, state = plan_of(model, editor, asked)
        own = Curvature.from_state(module, state)
        projection = low_curvature(own.inputs_II, own.gradients_OO, 0.5)
        update = plan.updates[module].double()
        shares[order] = float((update - projection(update)).norm() / update.norm())
        assert plan.nonfinite is None and float(update.norm()) > 0
        assert plan.summary["probability_after"] > plan.summary["probability_before"]
    assert shares["step"] < 1e-5 < 0.01 < shares["gradient"]


def test_the_published_order_is_adam_on_projected_gradients() -> None:
    from tests.editors.test_locft import plain_loss

    model, plain, asked = tiny_model("gpt2"), tiny_model("gpt2"), requests(3)
    editor = crispedit(order="gradient", mini_batch=3)
    (module,) = editor.modules(model)
    plan, state = plan_of(model, editor, asked)
    own = Curvature.from_state(module, state)
    projection = low_curvature(own.inputs_II, own.gradients_OO, 0.5)
    parameter = plain.module(module).weight.requires_grad_()
    before = parameter.detach().clone()
    adam = torch.optim.Adam([parameter], lr=0.01)
    for _ in range(3):
        adam.zero_grad()
        plain_loss(plain, asked, with_end=False).backward()
        parameter.grad = projection(parameter.grad.T).T.contiguous()  # type: ignore[union-attr]
        adam.step()
    assert relative(plan.updates[module], (parameter.detach() - before).T.double()) < 2e-2


def test_the_tokens_of_a_batch_join_the_sums_one_by_one() -> None:
    model, asked, editor = tiny_model("gpt2"), requests(2), crispedit()
    (module,) = editor.modules(model)
    plan, state = plan_of(model, editor, asked)
    first, moments = Curvature.from_state(module, state), model_moments(model, [module])
    torch.testing.assert_close(first.inputs_II / first.tokens, moments.second_moment(module))
    model.edit([module])
    model.apply(module, plan.updates[module])
    made = step(model, asked, state=state, moments=moments)
    after = Curvature.from_state(module, editor.observe(made, plan))
    from editkit.editors.crispedit import _sequences

    own = curvature(model, [module], _sequences(made))[module]
    assert after.tokens == first.tokens + own.tokens > first.tokens
    torch.testing.assert_close(after.gradients_OO, first.gradients_OO + own.gradients_OO)


def test_a_run_resumed_from_any_checkpoint_has_the_bits_of_a_whole_one() -> None:
    def job() -> Any:
        model, editor = tiny_model("gpt2"), crispedit(epochs=2)
        asked = [replace(each, id=f"c/{index}") for index, each in enumerate(requests(4))]
        made = trajectory(model, asked, editor=editor, batch_size=2, checkpoint_every=1)
        return replace(made, moments=model_moments(model, editor.modules(model)))

    states = [event for event in run_edits(job()) if isinstance(event, RunState)]
    rest = list(run_edits(job(), RunState.from_checkpoint(states[1].checkpoint({}))))
    last = next(event for event in reversed(rest) if isinstance(event, RunState))
    for name, total in states[-1].totals.items():
        assert torch.equal(last.totals[name].dense(), total.dense())
    for name, tensor in states[-1].editor.items():
        assert torch.equal(last.editor[name], tensor), name


def test_second_moments_without_texts_and_wrong_options_are_refused() -> None:
    model, editor = tiny_model("gpt2"), crispedit()
    with pytest.raises(ConfigError, match=r"texts: these second moments have no texts"):
        editor.init(model, Moments())
    with pytest.raises(OptionError) as raised:
        crispedit(layers=(), lr=0.0, energy=1.0, texts=0, text_length=1)
    for key in ("layers:", "lr:", "energy:", "texts:", "text_length:"):
        assert key in str(raised.value)
