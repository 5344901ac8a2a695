"""EMMET's update equals the plain formula, and meets its constraints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from editkit.editors.emmet import Emmet, equality_constrained
from editkit.editors.rome import Rome, RomePlan
from editkit.errors import ConfigError
from editkit.stats.least_squares import LeastSquares, least_squares
from editkit.targets.keys import keys_and_outputs
from tests.support.helpers import KINDS, request, requests, tiny_model
from tests.support.methods import memit, model_moments, moments_of, noise, second_moment, step

ROWS, SIZE, WEIGHT = 12, 24, 3.0
C = second_moment(SIZE, seed=1)
MOMENTS = moments_of({"m": C})


def emmet(**changes: Any) -> Emmet:
    alike = memit()
    options: dict[str, Any] = {
        "name": "emmet",
        "layers": (1,),
        "covariance_weight": WEIGHT,
        "relaxation": 0.1,
        "context_lengths": (),
        "target": alike.target,
    }
    return Emmet(**options | changes)


def problem(num_edits: int, **changes: Any) -> LeastSquares:
    posed = LeastSquares(
        module="m",
        keys_IN=noise(SIZE, num_edits, seed=2),
        residuals_ON=noise(ROWS, num_edits, seed=3),
        weight=WEIGHT,
    )
    return replace(posed, **changes)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("relaxation", [0.0, 0.1])
@pytest.mark.parametrize("num_edits", [1, 5, SIZE])
def test_the_update_is_the_plain_formula(num_edits: int, relaxation: float) -> None:
    posed = problem(num_edits)
    inverse_II, keys_IN = torch.linalg.inv(WEIGHT * C), posed.keys_IN
    gram_NN = keys_IN.T @ inverse_II @ keys_IN + relaxation * torch.eye(num_edits).double()
    plain = posed.residuals_ON @ torch.linalg.inv(gram_NN) @ keys_IN.T @ inverse_II
    update = equality_constrained(posed, MOMENTS, relaxation)
    assert relative(update.dense(), plain) < 1e-10
    assert update.rank == num_edits


@pytest.mark.parametrize("num_edits", [1, 5])
def test_without_lambda_every_constraint_is_met_and_the_weight_cancels(num_edits: int) -> None:
    posed = problem(num_edits)
    update = equality_constrained(posed, MOMENTS, 0.0).dense()
    assert relative(update @ posed.keys_IN, posed.residuals_ON) < 1e-10
    other = equality_constrained(replace(posed, weight=1e4), MOMENTS, 0.0).dense()
    assert relative(other, update) < 1e-10


def test_with_lambda_the_update_is_memits_with_the_product_of_the_weights() -> None:
    posed = problem(5)
    alike = least_squares(replace(posed, weight=0.1 * WEIGHT), MOMENTS)  # given in float32
    assert (
        relative(equality_constrained(posed, MOMENTS, 0.1).dense(), alike.dense().double()) < 1e-6
    )


def test_the_order_of_a_batch_does_not_matter() -> None:
    posed, order = problem(6), torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = replace(
        posed, keys_IN=posed.keys_IN[:, order], residuals_ON=posed.residuals_ON[:, order]
    )
    for relaxation in (0.0, 0.1):
        one, other = (
            equality_constrained(each, MOMENTS, relaxation).dense() for each in (posed, shuffled)
        )
        assert relative(one, other) < 1e-10


def test_one_key_with_two_targets_gets_their_mean_instead_of_a_huge_update() -> None:
    key, apart = noise(SIZE, 1, seed=4), noise(SIZE, 1, seed=5)
    rounded = key * (1 + 1e-8 * noise(SIZE, 1, seed=6))
    posed = problem(3, keys_IN=torch.cat([key, rounded, apart], dim=1))
    given = equality_constrained(posed, MOMENTS, 0.0).dense() @ posed.keys_IN
    mean = posed.residuals_ON[:, :2].mean(dim=1)
    assert relative(given[:, 0], mean) < 1e-6 and relative(given[:, 1], mean) < 1e-6
    assert relative(given[:, 2], posed.residuals_ON[:, 2]) < 1e-6


def test_a_key_that_is_not_finite_gives_an_update_that_is_not_finite() -> None:
    posed = problem(3)
    posed.keys_IN[0, 1] = torch.nan
    assert not torch.isfinite(equality_constrained(posed, MOMENTS, 0.1).dense()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_request_is_romes_update_for_the_same_key_and_delta(kind: Any) -> None:
    model, editor = tiny_model(kind), emmet()
    [module] = editor.modules(model)
    moments = model_moments(model, [module])
    here = step(model, [request()], moments=moments)
    plan = editor.plan(here)
    rome = Rome(
        name="rome",
        layers=(1,),
        keys="clean",
        covariance=True,
        context_lengths=(),
        target=editor.target,
    )
    target = rome.plan(here).target
    # The output of a block moves by what the output of its MLP moves by.
    plan_of_rome = RomePlan(target=replace(target, delta_O=plan.residuals_ON[:, 0]))
    ours, romes = (
        each.propose(here, module, its).dense()  # type: ignore[attr-defined]
        for each, its in ((editor, plan), (rome, plan_of_rome))
    )
    assert relative(ours, romes.double()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_moves_each_output_by_its_own_delta(kind: Any) -> None:
    model, editor = tiny_model(kind), emmet(relaxation=0.0)
    [module] = editor.modules(model)
    here = step(model, requests(), moments=model_moments(model, [module]))
    plan = editor.plan(here)

    def outputs_NO() -> torch.Tensor:
        return torch.cat(
            [
                keys_and_outputs(model, asked, module=module, contexts=("{}",))[1]
                for asked in requests()
            ]
        )

    before = outputs_NO()
    update = editor.propose(here, module, plan)
    assert update.rank == len(requests()) and update.dtype == torch.float32
    model.edit([module])
    model.apply(module, update)
    assert relative(outputs_NO() - before, plan.residuals_ON.T.double()) < 1e-4


def test_lambda_is_left_out_for_one_request_as_in_the_published_code() -> None:
    model = tiny_model("gpt2")
    [module] = emmet().modules(model)
    moments = model_moments(model, [module])
    for asked, is_equal in (([request()], True), (requests(), False)):
        here = step(model, asked, moments=moments)
        plan = emmet().plan(here)
        with_it, without = (
            emmet(relaxation=value).propose(here, module, plan).dense() for value in (10.0, 0.0)
        )
        assert torch.equal(with_it, without) == is_equal


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match=r"covariance_weight:(.|\n)*relaxation:"):
        emmet(covariance_weight=0.0, relaxation=-0.1)
