from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.config.identity import config_hash
from editkit.errors import ConfigError
from editkit.linalg.recursive import FOLDED_COLUMNS
from editkit.restraints.base import AbstractUpdateRestraint, Restraints
from editkit.restraints.d4s import D4S
from editkit.restraints.prune import Prune
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
BASES = ("trajectory", "unedited")
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


def job(
    model: Any,
    *,
    restraint: Any = None,
    batch_size: int = 1,
    layers: tuple[int, ...] = (0, 1),
    spread: Any = "recomputed",
    plain: bool = False,
    **others: Any,
) -> Any:
    """A run of six edits with a restraint on the solve, or with none."""
    editor = memit(layers=layers, spread=spread, target={"steps": 4})
    solve = None if plain else restraint or D4S()
    base = trajectory(
        model,
        [replace(each, id=f"r/{index}") for index, each in enumerate(requests(6))],
        editor=editor,
        restraints=Restraints(solve=solve, **others),
        milestones=(6,),
        batch_size=batch_size,
        checkpoint_every=1,
    )
    return replace(base, moments=model_moments(model, editor.modules(model)))


def totals_of(run: Any, state: RunState | None = None) -> dict[str, torch.Tensor]:
    """The totals at the end of a run."""
    list(run_edits(run, state))
    return {name: total.dense().double() for name, total in run.model.totals().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_a_runs_totals_are_one_batch_over_its_keys_and_its_residuals_relative_to_the_unedited_weights(
    kind: Any, base: Any, batch_size: int
) -> None:
    model, watched = tiny_model(kind), Watched(D4S(base=base), base=base)
    run = job(model, restraint=watched, batch_size=batch_size)
    totals = totals_of(run)
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
        assert relative(totals[module], wanted) < 1e-5  # updates are applied in float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch_size", "spread"), [(1, "recomputed"), (4, "published_code")])
def test_on_the_unedited_model_a_sequence_in_one_layer_is_one_memit_batch_of_them_all(
    kind: Any, batch_size: int, spread: Any
) -> None:
    options: dict[str, Any] = {"layers": (1,), "spread": spread}
    d4s = D4S(base="unedited")
    found = totals_of(job(tiny_model(kind), restraint=d4s, batch_size=batch_size, **options))
    wanted = totals_of(job(tiny_model(kind), batch_size=6, plain=True, **options))
    assert all(relative(found[name], wanted[name]) < 1e-4 for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_unedited_model_the_lowest_of_several_layers_is_that_of_one_memit_batch(
    kind: Any,
) -> None:
    """Above it they differ: a batch reads the keys of a layer with all edits in the layers below,
    a sequence with those that were made by then.
    """
    found = totals_of(job(tiny_model(kind), restraint=D4S(base="unedited")))
    wanted = totals_of(job(tiny_model(kind), batch_size=6, plain=True))
    lowest, above = wanted
    assert relative(found[lowest], wanted[lowest]) < 1e-4
    assert relative(found[above], wanted[above]) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_unedited_model_all_edits_at_once_are_memits_batch_bit_for_bit(kind: Any) -> None:
    found = totals_of(job(tiny_model(kind), restraint=D4S(base="unedited"), batch_size=6))
    wanted = totals_of(job(tiny_model(kind), batch_size=6, plain=True))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_measured_unedited_above_the_layers_that_hold_all_edits(kind: Any) -> None:
    """As in the authors' code. Every target, key and residual of the last edit is measured again,
    on a model that is put together by hand.
    """
    model, watched = tiny_model(kind), Watched(D4S(base="unedited"), base="unedited")
    run = job(model, restraint=watched)
    states = [event for event in run_edits(run) if isinstance(event, RunState)]
    before = {name: total.dense().double() for name, total in states[5].totals.items()}
    plain = tiny_model(kind)
    modules = run.editor.modules(plain)
    plain.edit(modules)
    measured: list[LeastSquares] = []
    asked = step(plain, [run.requests[5]], states[0].contexts, solver=measured.append)
    plan = run.editor.plan(asked)
    for module, problem in zip(modules, watched.problems[-2:], strict=True):
        run.editor.propose(asked, module, plan)
        assert relative(problem.keys_IN, measured[-1].keys_IN.double()) < 1e-5
        written = before[module] @ problem.keys_IN
        residuals = problem.residuals_ON.double() + written
        assert relative(residuals, measured[-1].residuals_ON.double()) < 1e-4
        plain.apply(module, model.total(module).dense())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(
    kind: Any, base: Any, tmp_path: Path
) -> None:
    whole_model = tiny_model(kind)
    for event in run_edits(job(whole_model, restraint=D4S(base=base))):
        if isinstance(event, RunState) and event.step == 3:
            save_state(event, tmp_path, {})
    model = tiny_model(kind)
    list(run_edits(job(model, restraint=D4S(base=base)), load_state(tmp_path)))
    for module in model.edited_modules:
        assert torch.equal(model.weight(module), whole_model.weight(module))


@pytest.mark.parametrize("base", BASES)
def test_a_view_leaves_the_trajectory_alone(base: Any) -> None:
    prune = Prune(
        function="linear", alpha=2.0, apply_at="evaluation", every=None, allow_amplify=True
    )
    alone = totals_of(job(tiny_model(), restraint=D4S(base=base)))
    viewed = totals_of(job(tiny_model(), restraint=D4S(base=base), totals={"prune": prune}))
    assert all(torch.equal(viewed[name], alone[name]) for name in alone)


@pytest.mark.parametrize("base", BASES)
def test_with_rollback_every_batch_is_memits_own(base: Any) -> None:
    run = replace(job(tiny_model(), restraint=D4S(base=base), batch_size=2), rollback=True)
    plain = replace(job(tiny_model(), batch_size=2, plain=True), rollback=True)
    found, wanted = totals_of(run), totals_of(plain)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@dataclass(frozen=True)
class Seen(AbstractUpdateRestraint):
    """Remembers the matrices that it was given."""

    weights: list[torch.Tensor]

    def restrain(self, update: Any, weight_OI: torch.Tensor, base: Any) -> Any:
        self.weights.append(weight_OI.clone())
        return update


@pytest.mark.parametrize("base", BASES)
def test_a_restraint_on_updates_is_given_the_edited_matrix(base: Any) -> None:
    seen, model, edited = Seen([]), tiny_model(), []
    run = job(model, restraint=D4S(base=base), updates=(seen,))
    for event in run_edits(run):
        if isinstance(event, RunState):
            edited += [model.weight(name).clone() for name in run.editor.modules(model)]
    assert len(seen.weights) == 12
    for found, wanted in zip(seen.weights, edited[:12], strict=True):
        assert torch.equal(found, wanted)


def test_a_configuration_from_before_the_option_keeps_its_meaning_and_its_folder() -> None:
    config = compose(["editor=d4s", "model=tiny-gpt2"]).config
    assert config["restraint"]["d4s"].pop("base") == "unedited"
    assert build(config).restraints.solve == D4S(base="trajectory")
    hashes = []
    for base in BASES:
        composed = compose(["editor=d4s", "model=tiny-gpt2", f"restraint.d4s.base={base}"])
        hashes.append(config_hash(composed.config))
    assert config_hash(config) == hashes[0] != hashes[1]


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
