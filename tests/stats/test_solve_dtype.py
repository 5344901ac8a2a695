"""`solve.dtype`: float32 halves the memory of a run. Its updates agree with those of float64 to a
few digits on spectra like those of keys.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.errors import ConfigError
from editkit.linalg.recursive import FOLDED_COLUMNS
from editkit.restraints.alphaedit import AlphaEdit
from editkit.restraints.base import AbstractSolveRestraint
from editkit.restraints.d4s import D4S
from editkit.runner.session import prepare
from editkit.stats.least_squares import LeastSquares, least_squares
from editkit.stats.store import Moments
from tests.support.methods import moments_of, noise

ROWS, SIZE = 24, 192
DTYPES = ("float32", "float64")
CONDITIONS = (1e4, 1e8)  # the bundled models' second moments have 2e3 to 4e4


def moment(condition: float) -> tuple[torch.Tensor, torch.Tensor]:
    """C with eigenvalues that fall as a power of their rank, as those of keys do, and a root of
    it.
    """
    vectors, _ = torch.linalg.qr(noise(SIZE, SIZE, seed=1))
    values = torch.arange(1, SIZE + 1, dtype=torch.float64) ** (
        -math.log(condition) / math.log(SIZE)
    )
    matrix = (vectors * values) @ vectors.T
    return (matrix + matrix.T) / 2, vectors * values.sqrt()


def problem_at(
    root: torch.Tensor, step: int, *, size: int = 1, weight: float = 10.0
) -> LeastSquares:
    """Keys that are distributed as those of common text."""
    return LeastSquares(
        module="m",
        keys_IN=root @ noise(SIZE, size, seed=step),
        residuals_ON=noise(ROWS, size, seed=9000 + step),
        weight=weight,
    )


def both(matrix: torch.Tensor) -> list[Moments]:
    return [moments_of({"m": matrix}).solved_in(dtype) for dtype in DTYPES]  # type: ignore[arg-type]


def errors(
    actual: torch.Tensor, expected: torch.Tensor, problem: LeastSquares, matrix: torch.Tensor
) -> list[float]:
    """The relative errors of an update: of the matrix, at its own keys, and on common text."""

    def text(update: torch.Tensor) -> torch.Tensor:
        return torch.trace(update @ matrix @ update.T).sqrt()

    error, keys = actual.double() - expected.double(), problem.keys_IN
    return [
        float(error.norm() / expected.norm()),
        float((error @ keys).norm() / (expected.double() @ keys).norm()),
        float(text(error) / text(expected.double())),
    ]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("size", [1, 30])
def test_memits_update_in_float32_is_the_float64_one(condition: float, size: int) -> None:
    matrix, root = moment(condition)
    problem = problem_at(root, 0, size=size)
    actual, expected = (least_squares(problem, moments).dense() for moments in both(matrix))
    assert 0 < max(errors(actual, expected, problem, matrix)) < 3e-4


@pytest.mark.parametrize("condition", CONDITIONS)
def test_romes_direction_in_float32_is_the_float64_one(condition: float) -> None:
    matrix, root = moment(condition)
    key = root @ noise(SIZE, 1, seed=2)
    actual, expected = (moments.inverse_times("m", key) for moments in both(matrix))
    assert actual.dtype == expected.dtype == torch.float64
    assert 0 < float((actual - expected).norm() / expected.norm()) < 3e-4


def restraint(name: str, matrix: torch.Tensor) -> AbstractSolveRestraint:
    """AlphaEdit with a null space that is smaller or larger than its complement: it keeps the
    smaller of the two.
    """
    if name == "d4s":
        return D4S()
    rank = SIZE // 3 if name == "alphaedit-small" else 2 * SIZE // 3
    return AlphaEdit(
        threshold=float(torch.linalg.eigvalsh(matrix)[rank]), threshold_unit="absolute", l2=1e-3
    )


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("name", ["d4s", "alphaedit-small", "alphaedit-large"])
def test_a_restraint_that_remembers_loses_no_more_after_many_edits(
    name: str, condition: float
) -> None:
    """The naive form, (A + sum K K^T)^-1 in float32, gives nan here at a condition number
    of 1e8.
    """
    matrix, root = moment(condition)
    restrained, moments = restraint(name, matrix), both(matrix)
    states = [restrained.init(None, own_moments) for own_moments in moments]  # type: ignore[arg-type]
    worst = []
    for step in range(150):  # past all forms of the history
        problem = problem_at(root, step)
        updates = [
            restrained.solve(problem, state, own_moments).dense()
            for state, own_moments in zip(states, moments, strict=True)
        ]
        states = [
            restrained.observe(problem, state, own_moments)
            for state, own_moments in zip(states, moments, strict=True)
        ]
        worst.append(max(errors(*updates, problem, matrix)))
    assert 0 < max(worst) < 1e-3
    assert max(worst[-30:]) < 30 * max(worst[:30])
    sizes = [sum(tensor.nbytes for tensor in state.values()) for state in states]
    assert sizes[1] == 2 * sizes[0] > 8 * SIZE**2 / 20
    assert sizes[1] <= 8 * (1.5 * SIZE**2 + FOLDED_COLUMNS * SIZE)


def test_the_factor_is_kept_in_that_dtype_and_the_second_moment_is_not() -> None:
    matrix, _ = moment(1e8)
    for dtype, moments in zip(DTYPES, both(matrix), strict=True):
        assert moments.by_module["m"].factor_II.dtype == getattr(torch, dtype)
        assert torch.equal(moments.second_moment("m"), matrix)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_configurations_choice_reaches_the_run(dtype: Any, tmp_path: Path) -> None:
    overrides = [
        "editor=d4s",
        "suite=none",
        "edits=1",
        "stats.num_documents=300",
        f"stats.folder={tmp_path}",
        f"solve.dtype={dtype}",
    ]
    few = {
        "dataset": {"_target_": "tests.support.build_parts.FewRequests", "name": "few", "size": 1}
    }
    job = prepare(build(compose(overrides).config | few), should_stop=lambda: False)
    assert job.moments.dtype == dtype
    assert {moment.factor_II.dtype for moment in job.moments.by_module.values()} == {
        getattr(torch, dtype)
    }


def test_another_dtype_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"solve\.dtype: invalid value \(got 'bfloat16'; expected 'float32' or 'float64'\)",
    ):
        build(compose(["solve.dtype=bfloat16"]).config)
