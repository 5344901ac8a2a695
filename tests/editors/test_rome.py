"""ROME's updates put the target vector where each variant says, on every architecture, and read the
model only.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch

from editkit.editors.rome import Rome, RomePlan
from editkit.errors import ConfigError
from editkit.linalg.lowrank import LowRank
from editkit.model.editable import EditableModel
from editkit.stats.store import Moments, SecondMoment
from editkit.targets.keys import keys_and_outputs
from editkit.types import EditRequest
from tests.support.helpers import KINDS, Kind, request, requests, tiny_model
from tests.support.methods import step
from tests.support.searches import CONTEXTS, settings, subject_at_the_end

Keys = Literal["averaged", "original", "clean"]
KEYS: tuple[Keys, ...] = ("averaged", "original", "clean")


def rome(**changes: Any) -> Rome:
    values: dict[str, Any] = {
        "name": "rome",
        "layers": (1,),
        "keys": "averaged",
        "covariance": True,
        "context_lengths": ((5, 2), (10, 2)),
        "target": settings(steps=5),  # what holds of an update holds wherever the search stopped
    }
    return Rome(**values | changes)


def moments_of(model: EditableModel, module: str, *, identity: bool = False) -> Moments:
    """A well-conditioned second moment that favours some directions."""
    size = model.weight(module).shape[1]
    samples_NI = torch.randn(
        4 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    )
    samples_NI *= torch.linspace(0.3, 3.0, size, dtype=torch.float64)
    matrix_II = (
        torch.eye(size, dtype=torch.float64)
        if identity
        else samples_NI.T @ samples_NI / len(samples_NI)
    )
    return Moments({module: SecondMoment(module, matrix_II, num_tokens=4 * size)})


def propose(
    model: EditableModel, editor: Rome, asked: EditRequest, moments: Moments | None = None
) -> tuple[RomePlan, LowRank]:
    [module] = editor.modules(model)
    moments = moments if moments is not None else moments_of(model, module)
    plan = editor.plan(step(model, [asked], CONTEXTS))
    return plan, editor.propose(step(model, [asked], CONTEXTS, moments=moments), module, plan)


def refuse_to_solve(problem: Any) -> Any:
    raise AssertionError("ROME's update is a closed form of its own")


def outputs_after(
    model: EditableModel, editor: Rome, asked: EditRequest, update: LowRank
) -> torch.Tensor:
    """(C, O): what the edited module gives at the subject in each context."""
    [module] = editor.modules(model)
    model.edit([module])
    model.apply(module, update)
    return keys_and_outputs(model, asked, module=module, contexts=CONTEXTS)[1]


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("covariance", [True, None])
@pytest.mark.parametrize("kind", KINDS)
def test_the_edited_matrix_gives_the_target_vector_for_its_key(
    kind: Kind, covariance: bool | None, keys: Keys
) -> None:
    model, editor = tiny_model(kind), rome(keys=keys, covariance=covariance)
    for asked in requests():
        plan, update = propose(tiny_model(kind), editor, asked)
        outputs_CO = outputs_after(tiny_model(kind), editor, asked, update)
        # Mean outputs are the outputs for the mean key: the module is affine.
        given_O = outputs_CO.mean(dim=0) if keys == "averaged" else outputs_CO[0]
        wanted_O = plan.target.vector_O.double()
        assert float((given_O - wanted_O).norm() / wanted_O.norm()) < 1e-5
        assert update.rank == 1
        assert update.shape == tuple(model.weight(editor.modules(model)[0]).shape)
        assert update.dtype == torch.float32


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_the_published_formula(kind: Kind, keys: Keys) -> None:
    model, editor, asked = tiny_model(kind), rome(keys=keys), request()
    [module] = editor.modules(model)
    moments = moments_of(model, module)
    plan, update = propose(model, editor, asked, moments)
    keys_CI, _ = keys_and_outputs(model, asked, module=module, contexts=CONTEXTS)
    weight_OI, mean_I, clean_I = model.weight(module).double(), keys_CI.mean(dim=0), keys_CI[0]
    right_I = torch.linalg.inv(moments.second_moment(module)) @ (
        clean_I if keys == "clean" else mean_I
    )
    right_I = right_I / right_I.norm()
    norming_I = mean_I if keys == "averaged" else clean_I
    # The target starts from the clean prompt's output W k_0 + b, so biases drop out: delta + W k_0
    # - W k.
    residual_O = plan.target.delta_O.double() + weight_OI @ (clean_I - norming_I)
    wanted_OI = torch.outer(residual_O, right_I) / (norming_I @ right_I)
    torch.testing.assert_close(
        update.dense().double(), wanted_OI, rtol=1e-4, atol=1e-5 * float(wanted_OI.abs().max())
    )
    assert float(update.right_IR.norm()) == pytest.approx(1.0, rel=1e-6)


def test_the_three_kinds_of_keys_give_three_updates() -> None:
    updates = [propose(tiny_model("gpt2"), rome(keys=keys), request())[1].dense() for keys in KEYS]
    assert not any(
        torch.allclose(updates[one], updates[other]) for one, other in ((0, 1), (0, 2), (1, 2))
    )


def test_without_contexts_the_three_kinds_of_keys_agree() -> None:
    model, asked = tiny_model("gpt2"), request()
    updates = []
    for keys in KEYS:
        editor = rome(keys=keys)
        [module] = editor.modules(model)
        plan = editor.plan(step(model, [asked], ("{}",)))
        updates.append(
            editor.propose(
                step(model, [asked], moments=moments_of(model, module)), module, plan
            ).dense()
        )
    assert torch.equal(updates[0], updates[1])
    assert torch.equal(updates[1], updates[2])


@pytest.mark.parametrize("keys", KEYS)
def test_a_linear_in_place_of_conv1d_gets_the_same_update(keys: Keys) -> None:
    convolution, linear = tiny_model("gpt2"), tiny_model("gpt2")
    mlp = linear.network.transformer.h[1].mlp
    rows, columns = mlp.c_proj.weight.T.shape
    replacement = torch.nn.Linear(columns, rows).requires_grad_(False)
    replacement.weight.copy_(mlp.c_proj.weight.T)
    replacement.bias.copy_(mlp.c_proj.bias)
    mlp.c_proj = replacement
    one, other = (
        propose(model, rome(keys=keys), request())[1].dense() for model in (convolution, linear)
    )
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_covariance_off_is_the_identity_as_covariance(kind: Kind) -> None:
    model, asked = tiny_model(kind), request()
    [module] = rome().modules(model)
    _, with_identity = propose(model, rome(), asked, moments_of(model, module, identity=True))
    _, without = propose(model, rome(covariance=None), asked, Moments())
    torch.testing.assert_close(with_identity.dense(), without.dense(), rtol=1e-5, atol=1e-6)
    _, false = propose(model, rome(covariance=False), asked, Moments())
    assert torch.equal(without.dense(), false.dense())


def test_statistics_are_wanted_only_with_covariance() -> None:
    model = tiny_model("gpt2")
    assert rome().moment_modules(model) == rome().modules(model) == ("transformer.h.1.mlp.c_proj",)
    assert rome(covariance=None).moment_modules(model) == ()
    assert rome(covariance=None).init(model, Moments()) == {}


def test_a_singular_covariance_is_refused_before_the_first_edit() -> None:
    model = tiny_model("gpt2")
    [module] = rome().modules(model)
    size = model.weight(module).shape[1]
    few = Moments(
        {module: SecondMoment(module, torch.eye(size, dtype=torch.float64), num_tokens=size - 1)}
    )
    with pytest.raises(ConfigError, match="cannot be inverted"):
        rome().init(model, few)
    flat = Moments(
        {
            module: SecondMoment(
                module, torch.zeros(size, size, dtype=torch.float64), num_tokens=10 * size
            )
        }
    )
    with pytest.raises(ConfigError, match=r"stats\.num_documents"):
        rome().init(model, flat)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_makes_its_target_probable(kind: Kind, bos: bool) -> None:
    editor, asked = rome(target=settings(clamp=20.0)), subject_at_the_end()
    model = tiny_model(kind, bos=bos)
    plan, update = propose(model, editor, asked)
    before = plan.summary["probability_before"]
    [module] = editor.modules(model)
    model.edit([module])
    model.apply(module, update)
    after = editor.plan(step(model, [asked], CONTEXTS)).summary["probability_before"]
    assert after > 10 * before
    assert plan.summary["probability_after"] > 10 * before


@pytest.mark.parametrize("kind", KINDS)
def test_propose_leaves_the_weights_as_they_are_and_repeats_its_bits(kind: Kind) -> None:
    model = tiny_model(kind)
    before = {name: parameter.clone() for name, parameter in model.network.named_parameters()}
    _, first = propose(model, rome(), request())
    _, second = propose(model, rome(), request())
    _, elsewhere = propose(tiny_model(kind), rome(), request())
    assert all(
        torch.equal(parameter, before[name]) for name, parameter in model.network.named_parameters()
    )
    for other in (second, elsewhere):
        assert torch.equal(first.left_OR, other.left_OR)
        assert torch.equal(first.right_IR, other.right_IR)


@pytest.mark.parametrize("kind", KINDS)
def test_keys_do_not_depend_on_the_other_contexts_of_the_batch(kind: Kind) -> None:
    model = tiny_model(kind)
    [module] = rome().modules(model)
    keys_CI, outputs_CO = keys_and_outputs(model, request(), module=module, contexts=CONTEXTS)
    for row, context in enumerate(CONTEXTS):
        alone_CI, alone_CO = keys_and_outputs(model, request(), module=module, contexts=[context])
        torch.testing.assert_close(alone_CI[0], keys_CI[row], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone_CO[0], outputs_CO[row], rtol=1e-5, atol=1e-6)


def test_the_summary_tells_what_the_search_did() -> None:
    plan, _ = propose(tiny_model("gpt2"), rome(target=settings(steps=7)), request())
    assert plan.summary["steps"] == 6
    assert set(plan.summary) == {"probability_before", "probability_after", "steps", "loss"}
    assert plan.nonfinite is None


def test_a_broken_network_is_told_and_nothing_is_raised() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.network.transformer.h[2].mlp.c_proj.weight.fill_(float("nan"))
    plan = rome().plan(step(model, [request()], CONTEXTS))
    assert plan.nonfinite == "loss"


def test_contexts_are_seeded_and_begin_with_the_bare_prompt() -> None:
    model, editor = tiny_model("gpt2"), rome()
    first, again, other = (
        editor.contexts(model, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first[0] == "{}"
    assert len(first) == 5
    assert all(context.count("{}") == 1 for context in first)


def test_options_that_cannot_work_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"layers:"):
        rome(layers=(1, 2))
    with pytest.raises(ConfigError, match=r"context_lengths:"):
        rome(context_lengths=((0, 5),))
    with pytest.raises(ConfigError, match="layers 0 to 2"):
        rome(layers=(3,)).modules(tiny_model("gpt2"))
    with pytest.raises(ConfigError, match="batch_size"):
        rome().plan(step(tiny_model("gpt2"), requests(2), CONTEXTS))


def test_a_subject_that_occurs_twice_is_edited_where_the_prompt_has_it() -> None:
    model = tiny_model("gpt2")
    asked = dataclasses.replace(
        request(), prompt="Paris, where {} lives, is in", subject="Paris", target="Rome"
    )
    editor = rome()
    plan, update = propose(model, editor, asked)
    outputs_CO = outputs_after(model, editor, asked, update)
    torch.testing.assert_close(
        outputs_CO.mean(dim=0), plan.target.vector_O.double(), rtol=1e-4, atol=1e-4
    )
