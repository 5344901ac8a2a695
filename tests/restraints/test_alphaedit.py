from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.config.compose import compose
from editkit.errors import ConfigError
from editkit.restraints.alphaedit import AlphaEdit
from editkit.restraints.base import Restraints
from editkit.runner.checkpoint import RunState, load_state, save_state
from editkit.runner.loop import run_edits
from editkit.stats.least_squares import LeastSquares
from editkit.targets.keys import average_keys, layerwise
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

ROWS, SIZE = 10, 32
C = second_moment(SIZE, seed=3)  # eigenvalues from 0.01 to 1
EYE = torch.eye(SIZE, dtype=torch.float64)


def alphaedit(
    threshold: float = 0.1, threshold_unit: Any = "absolute", l2: float = 10.0
) -> AlphaEdit:
    return AlphaEdit(threshold=threshold, threshold_unit=threshold_unit, l2=l2)


def projector(matrix: torch.Tensor, threshold: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    inside = vectors[:, values < threshold]
    return inside @ inside.T


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "threshold", [0.02, 0.3]
)  # a null space smaller and larger than its complement
@pytest.mark.parametrize("num_batches", [1, 3, 40])
def test_every_update_is_the_published_formulas(threshold: float, num_batches: int) -> None:
    restraint, moments, P = alphaedit(threshold), moments_of({"m": C}), projector(C, threshold)
    state, cache = restraint.init(None, moments), torch.zeros_like(C)
    for number in range(num_batches):
        keys, residuals = noise(SIZE, 2, seed=number), noise(ROWS, 2, seed=100 + number)
        problem = LeastSquares(module="m", keys_IN=keys, residuals_ON=residuals, weight=123.0)
        published = torch.linalg.solve(
            P @ (keys @ keys.T + cache) + 10.0 * EYE, P @ keys @ residuals.T
        ).T
        update = restraint.solve(problem, state, moments).dense()
        assert relative(update, published) < 1e-11
        assert relative(update @ P, update) < 1e-11
        state = restraint.observe(problem, state, moments)
        cache = cache + keys @ keys.T


def test_the_smaller_of_null_space_and_complement_is_kept() -> None:
    for threshold, name in ((0.02, "m.null_space"), (0.3, "m.complement")):
        (found,) = alphaedit(threshold).init(None, moments_of({"m": C})).items()
        assert found[0] == name and found[1].shape[1] <= SIZE / 2


def test_a_relative_threshold_follows_the_scale_of_the_keys() -> None:
    restraint = alphaedit(0.3, "relative")
    for scale in (1.0, 1e6):
        ((name, basis),) = restraint.init(None, moments_of({"m": scale * C})).items()
        inside = int((torch.linalg.eigvalsh(C) < 0.3 * C.trace() / SIZE).sum())
        assert basis.shape[1] == min(inside, SIZE - inside), name


def test_statistics_without_a_null_space_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(
        ConfigError,
        match=r"threshold: no eigenvalue of the second moment of m lies below .*threshold_unit=relative",
    ):
        alphaedit(1e-4).init(None, moments_of({"m": C}))


def test_a_singular_second_moment_is_welcome() -> None:
    singular = C.clone()
    singular[:, :8] = singular[:8, :] = 0.0
    state = alphaedit(1e-3).init(None, moments_of({"m": singular}))
    assert state["m.null_space"].shape == (SIZE, 8)


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match=r"threshold:(.|\n)*l2:"):
        alphaedit(0.0, l2=-1.0)


def job(model: Any, restraint: Any, *, batch_size: int = 1) -> Any:
    editor = memit(target={"steps": 4})
    base = trajectory(
        model,
        [replace(each, id=f"r/{index}") for index, each in enumerate(requests(6))],
        editor=editor,
        restraints=Restraints(solve=restraint),
        milestones=(6,),
        batch_size=batch_size,
        checkpoint_every=1,
    )
    return replace(base, moments=model_moments(model, editor.modules(model)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_run_leaves_the_span_of_common_keys_alone(kind: Any, batch_size: int) -> None:
    model = tiny_model(kind)
    run = job(model, alphaedit(0.3), batch_size=batch_size)
    list(run_edits(run))
    for module in model.edited_modules:
        total = model.total(module).dense().double()
        outside = torch.eye(total.shape[1], dtype=torch.float64) - projector(
            run.moments.second_moment(module), 0.3
        )
        assert float(total.norm()) > 0
        assert float((total @ outside).norm()) < 1e-6 * float(total.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_keys_measured_again_after_the_batch_are_those_that_were_solved_for(kind: Any) -> None:
    """Why the history takes them as they are: the published code's second measurement gives the
    same bits.
    """
    model, watched = tiny_model(kind), Watched(alphaedit(0.3, l2=0.01))
    run = job(model, watched, batch_size=3)
    states = [event for event in run_edits(run) if isinstance(event, RunState)]
    after_first = tiny_model(kind)
    after_first.edit(run.editor.modules(after_first))
    texts = run.editor.plan(step(after_first, run.batch(1), states[0].contexts)).texts

    def measured() -> list[torch.Tensor]:
        return [
            average_keys(layerwise(after_first, texts), layer, run.editor.context_weights)
            for layer in run.editor.layers
        ]

    unedited = measured()
    after_first.restore(states[1].totals)
    for index, again in enumerate(measured()):
        assert torch.equal(watched.problems[index].keys_IN, again)
        assert index == 0 or relative(unedited[index], again) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_bits_of_an_uninterrupted_one(kind: Any, tmp_path: Path) -> None:
    whole_model = tiny_model(kind)
    for event in run_edits(job(whole_model, alphaedit(0.3))):
        if isinstance(event, RunState) and event.step == 3:
            save_state(event, tmp_path, {})
    model = tiny_model(kind)
    list(run_edits(job(model, alphaedit(0.3)), load_state(tmp_path)))
    for module in model.edited_modules:
        assert torch.equal(model.weight(module), whole_model.weight(module))


def test_the_editor_of_that_name_composes_memit_with_the_restraint_and_the_authors_numbers() -> (
    None
):
    composed = compose(["editor=alphaedit", "model=llama3-8b", "restraint=rect"]).config
    assert set(composed["restraint"]) == {"alphaedit", "rect"}
    assert (composed["editor"]["target"]["lr"], composed["editor"]["target"]["clamp"]) == (
        0.1,
        0.75,
    )
    assert (
        composed["editor"] | {"name": "memit"}
        == compose(["editor=memit", "model=llama3-8b", "recipe=memit/llama3-8b-alphaedit"]).config[
            "editor"
        ]
    )
