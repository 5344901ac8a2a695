"""The least squares of the editors equal plain dense computations in float64."""

from __future__ import annotations

import pytest
import torch

from editkit.linalg.recursive import (
    FOLDED_COLUMNS,
    WIDEST_FACTOR,
    Memory,
    Prior,
    memory_of,
    with_memory,
)
from editkit.stats.least_squares import LeastSquares, least_squares
from tests.support.methods import moments_of, noise, second_moment

ROWS, SIZE, WEIGHT = 12, 24, 3.0
C = second_moment(SIZE, seed=1)
EYE = torch.eye(SIZE, dtype=torch.float64)


L = torch.linalg.cholesky(WEIGHT * C)
prior = Prior(
    whiten=lambda keys: torch.linalg.solve(L, keys),
    unwhiten=lambda white: torch.linalg.solve(L.T, white),
)


def problem(num_edits: int, *, seed: int = 2) -> LeastSquares:
    return LeastSquares(
        module="m",
        keys_IN=noise(SIZE, num_edits, seed=seed),
        residuals_ON=noise(ROWS, num_edits, seed=seed + 1),
        weight=WEIGHT,
    )


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("num_edits", [1, 5, SIZE, 3 * SIZE])
def test_least_squares_is_the_dense_solution_whatever_the_batch(num_edits: int) -> None:
    posed = problem(num_edits)
    keys, residuals = posed.keys_IN, posed.residuals_ON
    dense = residuals @ keys.T @ torch.linalg.inv(WEIGHT * C + keys @ keys.T)
    assert (
        relative(least_squares(posed, moments_of({"m": C})).dense(), dense) < 1e-6
    )  # given in float32
    assert relative(Memory().solve(keys, residuals, prior).dense(), dense) < 1e-12


def test_least_squares_minimises_its_objective() -> None:
    posed = problem(5)
    update = Memory().solve(posed.keys_IN, posed.residuals_ON, prior).dense().requires_grad_()
    loss = (update @ posed.keys_IN - posed.residuals_ON).square().sum() + WEIGHT * torch.trace(
        update @ C @ update.T
    )
    loss.backward()
    assert update.grad is not None and float(update.grad.abs().max()) < 1e-11


def test_a_batch_of_one_is_romes_update_times_a_number_below_one() -> None:
    key, residual = noise(SIZE, 1, seed=4), noise(ROWS, 1, seed=5)
    whitened = torch.linalg.solve(C, key)
    quadratic = float(key.T @ whitened)
    rome = residual @ whitened.T / quadratic  # maps the key onto the residual
    assert relative(rome @ key, residual) < 1e-13
    assert (
        relative(
            Memory().solve(key, residual, prior).dense(), quadratic / (quadratic + WEIGHT) * rome
        )
        < 1e-12
    )


@pytest.mark.parametrize("num_edits", [1, 4])
def test_without_lambda_the_residuals_are_met_exactly_by_the_update_of_least_whitened_norm(
    num_edits: int,
) -> None:
    """The equality-constrained solution R (K^T C^-1 K)^-1 K^T C^-1 (EMMET, arXiv 2403.14236); for
    one edit that is ROME's.
    """
    keys, residuals, weight = noise(SIZE, num_edits, seed=4), noise(ROWS, num_edits, seed=5), 1e-10
    lower = torch.linalg.cholesky(weight * C)
    tiny = Prior(
        whiten=lambda columns: torch.linalg.solve(lower, columns),
        unwhiten=lambda white: torch.linalg.solve(lower.T, white),
    )
    actual, whitened = Memory().solve(keys, residuals, tiny).dense(), torch.linalg.solve(C, keys)
    assert relative(actual, residuals @ torch.linalg.inv(keys.T @ whitened) @ whitened.T) < 1e-8
    assert relative(actual @ keys, residuals) < 1e-8


def sequence(num_batches: int, batch_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys, and the residuals as they stand on the unedited matrix."""
    return [
        (noise(SIZE, batch_size, seed=10 + 2 * step), noise(ROWS, batch_size, seed=11 + 2 * step))
        for step in range(num_batches)
    ]


@pytest.mark.parametrize(
    ("num_batches", "batch_size"), [(3, 1), (5, 2), (40, 1), (30, 7), (400, 1)]
)
def test_a_sequence_of_batches_reaches_what_one_batch_reaches(
    num_batches: int, batch_size: int
) -> None:
    """Three ways: the recursion with residuals on the current matrix, the two running sums, all
    keys at once.
    """
    memory, edited = Memory(), torch.zeros(ROWS, SIZE, dtype=torch.float64)
    keys_sum, cross_sum = torch.zeros_like(C), torch.zeros_like(edited)
    batches = sequence(num_batches, batch_size)
    for keys, residuals in batches:
        left_to_write = residuals - edited @ keys
        edited = edited + memory.solve(keys, left_to_write, prior).dense()
        memory = memory.plus(keys, prior)
        keys_sum += keys @ keys.T
        cross_sum += residuals @ keys.T
        assert relative(edited, cross_sum @ torch.linalg.inv(WEIGHT * C + keys_sum)) < 1e-10
    all_keys, all_residuals = (torch.cat(parts, dim=1) for parts in zip(*batches, strict=True))
    assert (
        relative(
            edited,
            all_residuals @ all_keys.T @ torch.linalg.inv(WEIGHT * C + all_keys @ all_keys.T),
        )
        < 1e-10
    )


def test_the_memory_is_the_inverse_of_prior_plus_keys_in_all_of_its_forms() -> None:
    memory, inverse_of = Memory(), WEIGHT * C
    forms = set()
    for keys, _ in sequence(100, 1):
        memory, inverse_of = memory.plus(keys, prior), inverse_of + keys @ keys.T
        assert relative(memory.inverse_times(EYE, prior), torch.linalg.inv(inverse_of)) < 1e-11
        forms.add((memory.factor_JR is None, memory.base_JJ is None))
    assert forms == {(False, True), (True, False), (False, False)}, (
        "a factor alone, a matrix alone, both"
    )


def test_the_memory_stops_growing() -> None:
    memory, sizes = Memory(), []
    for keys, _ in sequence(150, 1):
        memory = memory.plus(keys, prior)
        sizes.append(
            sum(
                tensor.numel()
                for tensor in (memory.factor_JR, memory.base_JJ)
                if tensor is not None
            )
        )
    assert sizes[:3] == [SIZE, 2 * SIZE, 3 * SIZE]
    assert int(WIDEST_FACTOR * SIZE) == sum(size < SIZE**2 for size in sizes)
    assert min(sizes[20:]) == SIZE**2
    assert max(sizes) == SIZE**2 + FOLDED_COLUMNS * SIZE


def test_a_memory_is_a_value() -> None:
    first = Memory().plus(noise(SIZE, 7, seed=1), prior)
    for memory in (Memory(), Memory().plus(noise(SIZE, 2, seed=1), prior), first):
        kept = [
            None if tensor is None else tensor.clone()
            for tensor in (memory.factor_JR, memory.base_JJ)
        ]
        memory.plus(noise(SIZE, 3, seed=2), prior)
        for before, after in zip(kept, (memory.factor_JR, memory.base_JJ), strict=True):
            assert (before is None and after is None) or torch.equal(before, after)


def test_a_memory_survives_its_state_and_leaves_that_of_others_alone() -> None:
    state = {"other.factor": EYE, "m.basis": EYE}
    for counts in ((2,), (9,), (9, 2)):
        memory = Memory()
        for seed, count in enumerate(counts):
            memory = memory.plus(noise(SIZE, count, seed=seed), prior)
        state = with_memory(state, "m", memory)
        assert torch.equal(
            memory_of(state, "m").inverse_times(EYE, prior), memory.inverse_times(EYE, prior)
        )
        assert set(state) - {"m.factor", "m.base"} == {"other.factor", "m.basis"}
        assert len(state) == 2 + len(counts)
    assert (
        relative(memory_of({}, "m").inverse_times(EYE, prior), torch.linalg.inv(WEIGHT * C)) < 1e-12
    )


@pytest.mark.parametrize("num_before", [0, 2, 9])
def test_keys_that_are_no_numbers_give_an_update_that_is_none(num_before: int) -> None:
    memory = Memory().plus(noise(SIZE, num_before, seed=3), prior) if num_before else Memory()
    keys = noise(SIZE, 2, seed=4)
    keys[0, 0] = torch.nan
    assert not memory.solve(keys, noise(ROWS, 2, seed=5), prior).is_finite()
    memory.plus(keys, prior)  # a collapse is a result, not an error


def test_repeating_a_key_is_no_trouble() -> None:
    memory, key = Memory(), 30 * noise(SIZE, 1, seed=6)
    for _ in range(200):
        memory = memory.plus(key, prior)
    exact = torch.linalg.inv(WEIGHT * C + 200 * key @ key.T)
    assert relative(memory.inverse_times(EYE, prior), exact) < 1e-8


def test_alphaedits_three_forms_agree() -> None:
    values, vectors = torch.linalg.eigh(C)
    basis = vectors[:, values < 0.1]
    projector, l2 = basis @ basis.T, 10.0
    earlier, keys, residuals = (
        noise(SIZE, 9, seed=7),
        noise(SIZE, 3, seed=8),
        noise(ROWS, 3, seed=9),
    )
    everything = torch.cat([earlier, keys], dim=1)
    published = torch.linalg.solve(
        projector @ (everything @ everything.T) + l2 * EYE, projector @ keys @ residuals.T
    ).T
    inside = basis.T @ everything
    eye = torch.eye(basis.shape[1], dtype=torch.float64)
    coordinates = (
        basis @ torch.linalg.inv(inside @ inside.T + l2 * eye) @ basis.T @ keys @ residuals.T
    ).T

    def project(columns: torch.Tensor) -> torch.Tensor:
        return projector @ columns / l2**0.5

    null_space = Prior(whiten=project, unwhiten=project)
    for memory in (
        Memory().plus(earlier, null_space),
        Memory().plus(earlier[:, :2], null_space).plus(earlier[:, 2:], null_space),
    ):
        actual = memory.solve(keys, residuals, null_space).dense()
        assert relative(actual, published) < 1e-12
        assert relative(actual, coordinates) < 1e-12
        assert relative(actual @ projector, actual) < 1e-12
