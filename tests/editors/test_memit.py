from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.linalg.lowrank import LowRank
from editkit.model.capture import capture
from editkit.model.editable import EditableModel
from editkit.model.tokens import encode, fill, pad, subject_position
from editkit.stats.least_squares import LeastSquares, least_squares
from editkit.targets.keys import (
    ROWS_AT_ONCE,
    average_keys,
    clean_outputs,
    layerwise,
    subject_texts,
)
from editkit.types import EditRequest
from tests.support.helpers import KINDS, request, requests, tiny_model
from tests.support.methods import memit, model_moments, step

CONTEXTS = ("{}", "The capital of France. {}", "She was born. {}")


@functools.lru_cache(maxsize=8)
def plan_of(kind: Any, **changes: Any) -> tuple[Any, ...]:
    """A model that nobody changes, an editor, its plan for three requests, and second moments."""
    model, editor = tiny_model(kind), memit(**changes)
    return (
        model,
        editor,
        editor.plan(step(model, requests(), CONTEXTS)),
        model_moments(model, editor.modules(model)),
    )


def run(
    model: EditableModel,
    editor: Any,
    plan: Any,
    moments: Any,
    asked: list[LeastSquares] | None = None,
) -> dict[str, LowRank]:
    """One batch, written into the model; the updates by module."""
    model.edit(editor.modules(model))
    updates = {}

    def solve(problem: LeastSquares) -> LowRank:
        if asked is not None:
            asked.append(problem)
        return least_squares(problem, moments)

    for module in editor.modules(model):
        updates[module] = editor.propose(
            step(model, requests(), CONTEXTS, moments=moments, solver=solve), module, plan
        )
        model.apply(module, updates[module])
    return updates


def at_subject(
    model: EditableModel, asked: EditRequest, context: str, *, inputs: Any = (), outputs: Any = ()
) -> torch.Tensor:
    """What one module sees or gives at the subject's last token, the plain way."""
    filled = fill(asked.prompt, asked.subject, context=context)
    encoded = encode(model.tokenizer, [filled.text])[0]
    with torch.no_grad(), capture(model, inputs=inputs, outputs=outputs) as captured:
        model.final_hidden(pad([encoded.ids]))
    found = {**captured.inputs, **captured.outputs}
    return next(iter(found.values()))[0, subject_position(encoded, filled)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_proposal_reads_the_weights_and_has_one_column_a_request(kind: Any) -> None:
    model, editor, plan, moments = plan_of(kind)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    for module in editor.modules(model):
        update = editor.propose(
            step(
                model,
                requests(),
                CONTEXTS,
                moments=moments,
                solver=lambda problem: least_squares(problem, moments),
            ),
            module,
            plan,
        )
        assert update.shape == tuple(model.weight(module).shape) and update.rank == 3
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in model.network.state_dict().items()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_clean_key_weighs_a_half_and_the_sampled_ones_share_the_rest(kind: Any) -> None:
    model, editor, plan, _ = plan_of(kind)
    module = editor.modules(model)[0]
    found = average_keys(layerwise(model, plan.texts), editor.layers[0], editor.context_weights)
    for column, asked in enumerate(requests()):
        keys = [at_subject(model, asked, context, inputs=[module]).double() for context in CONTEXTS]
        assert torch.allclose(
            found[:, column], 0.5 * keys[0] + 0.25 * keys[1] + 0.25 * keys[2], atol=1e-6
        )


def test_kinds_of_context_weigh_the_same_whatever_their_number_of_texts() -> None:
    assert memit(context_lengths=((10, 5),)).context_weights == pytest.approx(
        (0.5, 0.1, 0.1, 0.1, 0.1, 0.1)
    )
    assert memit(context_lengths=((5, 2), (10, 1))).context_weights == pytest.approx(
        (1 / 3, 1 / 6, 1 / 6, 1 / 3)
    )
    assert memit(context_lengths=()).context_weights == (1.0,)


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_gets_its_share_of_what_is_missing_when_its_turn_comes(kind: Any) -> None:
    editor, model = memit(layers=(0, 1, 2), covariance_weight=0.5), tiny_model(kind)
    plan, moments = (
        editor.plan(step(model, requests(), CONTEXTS)),
        model_moments(model, editor.modules(model)),
    )
    model.edit(editor.modules(model))
    for index, module in enumerate(editor.modules(model)):
        now = torch.stack(
            [
                at_subject(model, asked, "{}", outputs=[model.family.block(2)])
                for asked in requests()
            ],
            dim=1,
        )
        problems: list[LeastSquares] = []

        def solve(problem: LeastSquares, problems: list[LeastSquares] = problems) -> LowRank:
            problems.append(problem)
            return least_squares(problem, moments)

        model.apply(
            module,
            editor.propose(
                step(model, requests(), CONTEXTS, moments=moments, solver=solve), module, plan
            ),
        )
        assert torch.allclose(
            problems[0].residuals_ON, (plan.targets_ON - now) / (3 - index), atol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_brings_the_hidden_states_closer_to_their_targets(kind: Any) -> None:
    editor, model = memit(), tiny_model(kind)
    plan = editor.plan(step(model, requests(), CONTEXTS))
    run(model, editor, plan, model_moments(model, editor.modules(model)))
    now = clean_outputs(layerwise(model, plan.texts), 1, len(CONTEXTS))
    missing = (plan.targets_ON - now).norm(dim=0) / plan.residuals_ON.norm(dim=0)
    assert float(missing.max()) < 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_with_clean_keys_and_no_covariance_the_last_layer_writes_what_is_missing(kind: Any) -> None:
    editor, model = memit(context_lengths=(), covariance_weight=1e-6), tiny_model(kind)
    plan = editor.plan(step(model, requests(), ("{}",)))
    run(model, editor, plan, model_moments(model, editor.modules(model)))
    now = clean_outputs(layerwise(model, plan.texts), 1, 1)
    assert float((plan.targets_ON - now).norm() / plan.residuals_ON.norm()) < 1e-3


def test_d4s_published_spread_measures_once_and_so_writes_the_residual_more_than_once() -> None:
    editor = memit(layers=(0, 1, 2, 3, 4), spread="published_code", target={"steps": 2})
    model = tiny_model("gpt2", num_layers=6)
    plan, asked = editor.plan(step(model, requests(), CONTEXTS)), []
    run(model, editor, plan, model_moments(model, editor.modules(model)), asked)
    assert torch.allclose(
        sum(problem.residuals_ON for problem in asked),
        plan.residuals_ON * (1 / 5 + 1 / 4 + 1 / 3 + 1 / 2 + 1),
    )
    assert pytest.approx(2.2833, abs=1e-4) == 1 / 5 + 1 / 4 + 1 / 3 + 1 / 2 + 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_targets_become_more_probable(kind: Any) -> None:
    _, _, plan, _ = plan_of(kind)
    assert plan.nonfinite is None
    assert plan.summary["probability_after"] > plan.summary["probability_before"]
    assert set(plan.summary) == {"probability_before", "probability_after", "steps", "loss"}
    assert plan.summary["steps"] == 5  # of Adam: one fewer than `steps`


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_batch_twice_gives_the_same_bits(kind: Any) -> None:
    results = []
    for _ in range(2):
        editor, model = memit(target={"steps": 3}), tiny_model(kind)
        contexts = editor.contexts(model, torch.Generator().manual_seed(1))
        plan = editor.plan(step(model, requests(), contexts))
        results.append(run(model, editor, plan, model_moments(model, editor.modules(model))))
    for first, second in zip(results[0].values(), results[1].values(), strict=True):
        assert torch.equal(first.left_OR, second.left_OR) and torch.equal(
            first.right_IR, second.right_IR
        )


def test_a_large_batch_measures_the_keys_that_small_ones_do() -> None:
    model, editor = tiny_model("llama"), memit()
    texts = [
        subject_texts(model, request(index), CONTEXTS) for index in range(ROWS_AT_ONCE // 3 + 5)
    ]
    together = average_keys(layerwise(model, texts), 1, editor.context_weights)
    assert together.shape == (80, len(texts)) and together.dtype == torch.float64
    for index in (0, ROWS_AT_ONCE // 3, len(texts) - 1):
        alone = average_keys(layerwise(model, texts[index : index + 1]), 1, editor.context_weights)
        assert torch.allclose(together[:, index], alone[:, 0], atol=1e-5)


def test_conv1d_and_linear_get_the_same_updates() -> None:
    conv1d, linear = tiny_model("gpt2"), tiny_model("gpt2")
    for layer in range(3):
        mlp = linear.module(linear.family.mlp(layer))
        replaced = torch.nn.Linear(*mlp.c_proj.weight.shape)
        replaced.weight.data = mlp.c_proj.weight.data.T.contiguous()
        replaced.bias.data = mlp.c_proj.bias.data
        mlp.c_proj = replaced.requires_grad_(False)
    editor, updates = memit(), []
    moments = model_moments(conv1d, editor.modules(conv1d))
    for model in (conv1d, linear):
        updates.append(run(model, editor, editor.plan(step(model, requests(), CONTEXTS)), moments))
    for first, second in zip(updates[0].values(), updates[1].values(), strict=True):
        assert float((first.dense() - second.dense()).norm() / first.dense().norm()) < 1e-3


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(
        ConfigError,
        match=r"layers:(.|\n)*context_lengths:(.|\n)*covariance_weight:",
    ):
        memit(layers=(3, 1), covariance_weight=0.0, context_lengths=((1, 5),))
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        memit(layers=(1, 7)).modules(tiny_model("gpt2"))
