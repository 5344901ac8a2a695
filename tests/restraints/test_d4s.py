from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.config.compose import compose
from editkit.errors import ConfigError
from editkit.linalg.recursive import FOLDED_COLUMNS
from editkit.restraints.base import Restraints
from editkit.restraints.d4s import D4S
from editkit.runner.checkpoint import RunState, load_state, save_state
from editkit.runner.loop import run_edits
from editkit.stats.least_squares import LeastSquares
from editkit.stats.store import Moments, SecondMoment
from tests.support.fakes import trajectory
from tests.support.helpers import KINDS, requests, tiny_model
from tests.support.methods import (
    Watched,
    memit,
    model_moments,
    moments_of,
    noise,
    second_moment,
    step,
)

ROWS, SIZE, WEIGHT = 10, 32, 2.0
C = second_moment(SIZE, seed=3)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def follow(
    batches: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The restraint over a sequence of (keys, residuals at W_0), in float64: the sum of updates,
    and the state.
    """
    restraint, moments = D4S(), moments_of({"m": C})
    state, edited = restraint.init(None, moments), torch.zeros(ROWS, SIZE, dtype=torch.float64)
    for keys, residuals in batches:
        problem = LeastSquares(
            module="m", keys_IN=keys, residuals_ON=residuals - edited @ keys, weight=WEIGHT
        )
        edited = edited + restraint.solve(problem, state, moments).dense()
        state = restraint.observe(problem, state, moments)
    return edited, dict(state)


@pytest.mark.parametrize("batch_sizes", [(1,) * 4, (1,) * 100, (3, 1, 7), (50, 50, 50), (200,)])
def test_a_sequence_of_edits_is_one_memit_batch_of_them_all(batch_sizes: tuple[int, ...]) -> None:
    batches = [
        (noise(SIZE, size, seed=2 * step), noise(ROWS, size, seed=2 * step + 1))
        for step, size in enumerate(batch_sizes)
    ]
    keys, residuals = (torch.cat(each, dim=1) for each in zip(*batches, strict=True))
    dense = residuals @ keys.T @ torch.linalg.inv(WEIGHT * C + keys @ keys.T)
    assert relative(follow(batches)[0], dense) < 1e-8


def test_ill_conditioned_statistics_cost_no_more_digits_after_many_edits_than_after_one() -> None:
    bad = second_moment(SIZE, seed=3, condition=1e8)
    restraint, moments = D4S(), moments_of({"m": bad})
    state, inverse_of = restraint.init(None, moments), WEIGHT * bad
    errors = []
    for number in range(600):
        keys, residuals = (
            torch.linalg.cholesky(bad) @ noise(SIZE, 1, seed=number),
            noise(ROWS, 1, seed=10_000 + number),
        )
        problem = LeastSquares(module="m", keys_IN=keys, residuals_ON=residuals, weight=WEIGHT)
        inverse_of = inverse_of + keys @ keys.T
        errors.append(
            relative(
                restraint.solve(problem, state, moments).dense(),
                residuals @ torch.linalg.solve(inverse_of, keys).T,
            )
        )
        state = restraint.observe(problem, state, moments)
    assert max(errors[-50:]) < 10 * max(errors[:50])


def test_memory_and_work_do_not_grow_with_the_number_of_edits() -> None:
    def numbers(num_edits: int) -> int:
        _, state = follow(
            [(noise(SIZE, 1, seed=index), noise(ROWS, 1, seed=index)) for index in range(num_edits)]
        )
        return sum(tensor.numel() for tensor in state.values())

    assert numbers(5) == 5 * SIZE
    assert max(numbers(count) for count in range(40, 120)) <= SIZE**2 + FOLDED_COLUMNS * SIZE
    assert numbers(9 + 33) == numbers(9 + 5 * 33) == SIZE**2, (
        "once in 33 edits all is in one matrix"
    )


@pytest.mark.parametrize(("num_layers", "times"), [(5, 2.2833), (6, 2.45)])
def test_the_published_codes_spread_overshoots_with_d4s_as_well(
    num_layers: int, times: float
) -> None:
    model, watched = tiny_model("gpt2", num_layers=num_layers), Watched(D4S())
    editor = memit(layers=tuple(range(num_layers)), spread="published_code", target={"steps": 2})
    model.edit(editor.modules(model))
    moments = model_moments(model, editor.modules(model))
    plan, state = (
        editor.plan(step(model, requests(1), ("{}", "She was. {}", "It is. {}"))),
        watched.init(model, moments),
    )
    for module in editor.modules(model):
        solve = partial(watched.solve, state=state, moments=moments)
        model.apply(
            module,
            editor.propose(step(model, requests(1), moments=moments, solver=solve), module, plan),
        )
    asked_for = torch.stack([problem.residuals_ON for problem in watched.problems]).sum(dim=0)
    torch.testing.assert_close(asked_for, times * plan.residuals_ON, rtol=1e-4, atol=1e-6)


def test_a_second_moment_that_cannot_be_inverted_is_found_before_the_first_edit() -> None:
    moments = Moments(
        {"m": SecondMoment("m", torch.zeros(SIZE, SIZE, dtype=torch.float64), 100 * SIZE)}
    )
    with pytest.raises(ConfigError, match="cannot be inverted"):
        D4S().init(None, moments)


def job(model: Any, *, restraint: Any = None, batch_size: int = 1, weight: float = 0.1) -> Any:
    editor = memit(covariance_weight=weight, target={"steps": 4})
    base = trajectory(
        model,
        [replace(each, id=f"r/{index}") for index, each in enumerate(requests(6))],
        editor=editor,
        restraints=Restraints(solve=restraint or D4S()),
        milestones=(6,),
        batch_size=batch_size,
        checkpoint_every=1,
    )
    return replace(base, moments=model_moments(model, editor.modules(model)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_a_runs_totals_are_one_batch_over_its_keys_and_its_residuals_relative_to_the_unedited_weights(
    kind: Any, batch_size: int
) -> None:
    model, watched = tiny_model(kind), Watched(D4S())
    run = job(model, restraint=watched, batch_size=batch_size)
    list(run_edits(run))
    for module in run.editor.modules(model):
        size = model.weight(module).shape[1]
        cross, keys_sum, before = (
            0.0,
            0.1 * run.moments.second_moment(module),
            torch.zeros(model.weight(module).shape, dtype=torch.float64),
        )
        for problem, update in zip(watched.problems, watched.updates, strict=True):
            if problem.module == module:
                cross = (
                    cross
                    + (problem.residuals_ON.double() + before @ problem.keys_IN) @ problem.keys_IN.T
                )
                keys_sum = keys_sum + problem.keys_IN @ problem.keys_IN.T
                before = before + update.dense().double()
        wanted = cross @ torch.linalg.solve(keys_sum, torch.eye(size, dtype=torch.float64))
        assert (
            relative(model.total(module).dense(), wanted) < 1e-5
        )  # updates are applied in float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(kind: Any, tmp_path: Path) -> None:
    whole_model = tiny_model(kind)
    for event in run_edits(job(whole_model)):
        if isinstance(event, RunState) and event.step == 3:
            save_state(event, tmp_path, {})
    model = tiny_model(kind)
    list(run_edits(job(model), load_state(tmp_path)))
    for module in model.edited_modules:
        assert torch.equal(model.weight(module), whole_model.weight(module))


def test_later_edits_spare_earlier_ones_more_than_memit_does() -> None:
    """The same keys with contradicting residuals: the history halves what the second edit may
    undo.
    """
    key, residual = noise(SIZE, 1, seed=1), noise(ROWS, 1, seed=2)
    with_history, _ = follow([(key, residual), (key, -residual)])
    assert float((with_history @ key).norm()) < 1e-12 * float(
        residual.norm()
    )  # one batch of both: a draw
    without, _ = follow([(key, -residual)])
    assert float((without @ key + residual).norm()) < float(residual.norm())


def test_the_editor_of_that_name_composes_memit_with_the_restraint_and_takes_others_beside_it() -> (
    None
):
    composed = compose(["editor=d4s", "model=gptj-6b", "restraint=prune"]).config
    plain = compose(["editor=memit", "model=gptj-6b", "restraint=[d4s,prune]"]).config
    assert composed["editor"] | {"name": "memit"} == plain["editor"]
    assert composed["restraint"] == plain["restraint"] and set(composed["restraint"]) == {
        "d4s",
        "prune",
    }
