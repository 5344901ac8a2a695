"""Properties of the linear algebra for all shapes, numbers and orders. Hypothesis searches for
counterexamples.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from editkit.linalg.lowrank import LowRank, Update, dense, frobenius, sigma_max
from editkit.linalg.recursive import FOLDED_COLUMNS, Memory, Prior
from editkit.linalg.spectral import (
    DIRECT_SIZE,
    Spectrum,
    extreme_singular_values,
    gram,
    largest_singular_value,
)
from editkit.linalg.total import Total
from editkit.stats.least_squares import LeastSquares, least_squares
from tests.support.methods import moments_of, noise

bounded = settings(max_examples=30, deadline=None, derandomize=True)
few = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
sides = st.integers(1, 20)
exponents = st.floats(0, 8)  # of a condition number


def factors(rows: int, columns: int, rank: int, seed: int, *, dependent: bool = False) -> LowRank:
    """Gaussian factors, float64; if dependent, the columns repeat and one of them is zero."""
    left, right = noise(rows, rank, seed=seed), noise(columns, rank, seed=seed + 1)
    if dependent and rank > 1:
        left[:, -1] = 0
        left[:, 0] = left[:, rank // 2]
        right[:, 0] = right[:, rank // 2]
    return LowRank(left, right)


def orthonormal(size: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(noise(size, size, seed=seed)).Q


def positive(size: int, exponent: float, seed: int) -> torch.Tensor:
    """A positive definite matrix with that condition number."""
    vectors = orthonormal(size, seed)
    matrix = (vectors * torch.logspace(0, -exponent, size, dtype=torch.float64)) @ vectors.T
    return (matrix + matrix.T) / 2


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Relative in the Frobenius norm; two zeros are close."""
    return float((actual.double() - expected.double()).norm()) <= tolerance * float(
        expected.double().norm()
    )


# LowRank


@bounded
@given(sides, sides, st.integers(0, 25), seeds, st.booleans())
def test_norms_of_factors_satisfy_the_inequalities_of_norms(
    rows: int, columns: int, rank: int, seed: int, dependent: bool
) -> None:
    update, other = (
        factors(rows, columns, rank, seed, dependent=dependent),
        factors(rows, columns, 2, seed + 7),
    )
    largest, whole = update.sigma_max(), update.frobenius()
    slack = 1e-7 * (whole + 1)
    assert largest <= whole + slack
    assert whole <= math.sqrt(min(rank, rows, columns)) * largest + slack
    assert (update + other).sigma_max() <= largest + other.sigma_max() + slack
    assert (update + -update).frobenius() <= 1e-6 * (
        update.left_OR.norm() * update.right_IR.norm() + 1
    )


@bounded
@given(sides, sides, st.integers(0, 25), seeds, st.booleans())
def test_the_singular_values_of_factors_are_those_of_the_matrix(
    rows: int, columns: int, rank: int, seed: int, dependent: bool
) -> None:
    update = factors(rows, columns, rank, seed, dependent=dependent)
    u_OK, s_K, v_IK = update.svd()
    expected = torch.linalg.svdvals(update.dense())
    assert torch.allclose(s_K, expected[: len(s_K)], atol=1e-9 * (1 + update.frobenius()))
    assert close((u_OK * s_K) @ v_IK.T, update.dense(), 1e-10)


@bounded
@given(sides, sides, st.integers(1, 25), seeds, st.booleans(), st.floats(0, 0.9))
def test_compression_error_stays_within_the_tolerance(
    rows: int, columns: int, rank: int, seed: int, dependent: bool, rtol: float
) -> None:
    update = factors(rows, columns, rank, seed, dependent=dependent)
    compressed = update.compress(rtol)
    error = torch.linalg.matrix_norm(compressed.dense() - update.dense(), ord=2)
    assert float(error) <= (rtol + 1e-10) * float(torch.linalg.matrix_norm(update.dense(), ord=2))
    assert compressed.rank <= min(rank, rows, columns)
    assert compressed.compress(rtol).rank == compressed.rank


# Total

updates = st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from(["float32", "float64", "dense"])), max_size=12
)


def drawn_updates(shape: tuple[int, int], drawn: list[tuple[int, str]], seed: int) -> list[Update]:
    """Updates in the order drawn: factors of that rank in that dtype, or a dense matrix."""
    sequence: list[Update] = []
    for index, (rank, kind) in enumerate(drawn):
        update = factors(*shape, rank, seed + 10 * index)
        sequence.append(
            update.dense().float() if kind == "dense" else update.to(dtype=getattr(torch, kind))
        )
    return sequence


@bounded
@given(st.tuples(sides, sides), updates, seeds, st.integers(0, 12))
def test_a_total_is_the_ordered_float32_sum_also_if_it_is_restored_at_any_step(
    shape: tuple[int, int], drawn: list[tuple[int, str]], seed: int, saved_at: int
) -> None:
    parts = drawn_updates(shape, drawn, seed)
    total, sum_OI = Total(shape), torch.zeros(shape)
    for index, part in enumerate(parts):
        if index == saved_at:
            total = Total.from_state(shape, total.state())
        total, sum_OI = (
            total.plus(part),
            sum_OI + (dense(part) if isinstance(part, torch.Tensor) else part.dense().float()),
        )
    assert torch.equal(total.dense(), sum_OI)
    assert total.frobenius() == pytest.approx(frobenius(sum_OI), rel=1e-6)
    assert total.sigma_max() == pytest.approx(
        sigma_max(sum_OI), rel=1e-4, abs=1e-5 * (1 + frobenius(sum_OI))
    )
    held = sum(
        tensor.numel() for block in total.blocks for tensor in (block.left_OR, block.right_IR)
    )
    assert held <= shape[0] * shape[1], "factors are kept only while they are the smaller form"


# Least squares


@bounded
@given(
    st.integers(2, 16), st.integers(1, 24), st.integers(1, 8), exponents, st.floats(-4, 5), seeds
)
def test_least_squares_has_no_gradient_left(
    size: int, edits: int, rows: int, exponent: float, weight: float, seed: int
) -> None:
    matrix, keys, residuals = (
        positive(size, exponent, seed),
        noise(size, edits, seed=seed + 1),
        noise(rows, edits, seed=seed + 2),
    )
    problem = LeastSquares(module="m", keys_IN=keys, residuals_ON=residuals, weight=10.0**weight)
    update = least_squares(problem, moments_of({"m": matrix})).dense().double()
    gradient = (update @ keys - residuals) @ keys.T + problem.weight * update @ matrix
    # The update is float32, so the gradient may keep a float32 rounding error of its largest term.
    scale = update.norm() * (keys @ keys.T + problem.weight * matrix).norm()
    assert float(gradient.norm()) <= 1e-5 * float(scale) + 1e-12


@bounded
@given(st.integers(2, 16), st.integers(1, 12), exponents, seeds, st.randoms(use_true_random=False))
def test_the_order_of_a_batch_and_a_turned_basis_of_keys_change_nothing(
    size: int, edits: int, exponent: float, seed: int, order: object
) -> None:
    matrix, keys, residuals = (
        positive(size, exponent, seed),
        noise(size, edits, seed=seed + 1),
        noise(5, edits, seed=seed + 2),
    )

    def solved(matrix: torch.Tensor, keys: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        problem = LeastSquares(module="m", keys_IN=keys, residuals_ON=residuals, weight=1.0)
        return least_squares(problem, moments_of({"m": matrix})).dense().double()

    update = solved(matrix, keys, residuals)
    shuffled = list(range(edits))
    order.shuffle(shuffled)  # type: ignore[attr-defined]
    assert close(solved(matrix, keys[:, shuffled], residuals[:, shuffled]), update, 1e-5)
    turn = orthonormal(size, seed + 3)
    turned = turn @ matrix @ turn.T
    assert close(solved((turned + turned.T) / 2, turn @ keys, residuals), update @ turn.T, 1e-5)


# The recursion

splits = st.lists(st.integers(1, 2 * FOLDED_COLUMNS), min_size=1, max_size=6)


def prior_of(matrix: torch.Tensor) -> Prior:
    lower = torch.linalg.cholesky(matrix)
    return Prior(
        whiten=lambda keys: torch.linalg.solve_triangular(lower, keys, upper=False),
        unwhiten=lambda white: torch.linalg.solve_triangular(lower.T, white, upper=True),
    )


@bounded
@given(st.integers(2, 24), splits, exponents, seeds)
def test_however_keys_are_split_into_batches_the_memory_and_the_sum_of_updates_are_the_same(
    size: int, split: list[int], exponent: float, seed: int
) -> None:
    matrix, total = positive(size, exponent, seed), sum(split)
    # The keys have the prior's scale. Otherwise the condition number of the sum limits the
    # accuracy, not the recursion.
    prior, keys = (
        prior_of(matrix),
        torch.linalg.cholesky(matrix) @ noise(size, total, seed=seed + 1),
    )
    residuals, memory, edited = (
        noise(4, total, seed=seed + 2),
        Memory(),
        torch.zeros(4, size, dtype=torch.float64),
    )
    for batch, expected in zip(
        keys.split(split, dim=1), residuals.split(split, dim=1), strict=True
    ):
        edited = edited + memory.solve(batch, expected - edited @ batch, prior).dense()
        memory = memory.plus(batch, prior)
    at_once = Memory().solve(keys, residuals, prior).dense()
    assert close(
        edited @ torch.linalg.cholesky(matrix), at_once @ torch.linalg.cholesky(matrix), 1e-8
    )
    probe = torch.linalg.cholesky(matrix) @ noise(size, 3, seed=seed + 3)
    expected = torch.linalg.solve(matrix + keys @ keys.T, probe)
    # Errors are compared in the coordinates in which the prior is the identity.
    whitened = torch.linalg.cholesky(matrix).T
    assert close(whitened @ memory.inverse_times(probe, prior), whitened @ expected, 1e-6)


@bounded
@given(st.integers(2, 24), splits, seeds, st.sampled_from(["float32", "float64"]))
def test_a_memory_stays_between_zero_and_the_identity(
    size: int, split: list[int], seed: int, dtype: str
) -> None:
    identity = Prior(whiten=lambda keys: keys, unwhiten=lambda white: white)
    memory, slack = Memory(), 1e-4 if dtype == "float32" else 1e-12
    for index, count in enumerate(split):
        memory = memory.plus(3 * noise(size, count, seed=seed + index), identity, dtype=dtype)  # type: ignore[arg-type]
        values = torch.linalg.eigvalsh(
            memory.inverse_times(torch.eye(size, dtype=torch.float64), identity)
        )
        assert -slack <= float(values[0]) and float(values[-1]) <= 1 + slack


# Spectra


def with_values(shape: tuple[int, int], values_M: torch.Tensor, seed: int) -> torch.Tensor:
    u_OM, v_IM = (
        torch.linalg.qr(noise(side, min(shape), seed=seed + index)).Q
        for index, side in enumerate(shape)
    )
    return (u_OM * values_M) @ v_IM.T


def assert_extremes(spectrum: Spectrum, values_M: torch.Tensor, *, rel: float = 2e-6) -> None:
    assert spectrum.sigma_max == pytest.approx(float(values_M.max()), rel=rel)
    assert spectrum.sigma_min == pytest.approx(float(values_M.min()), rel=rel)


@bounded
@given(st.tuples(sides, sides), st.floats(0, 5), st.floats(-6, 6), seeds)
def test_extreme_singular_values_of_small_matrices_are_recovered(
    shape: tuple[int, int], exponent: float, scale: float, seed: int
) -> None:
    values = 10**scale * torch.logspace(0, -exponent, min(shape), dtype=torch.float64)
    matrix = with_values(shape, values, seed)
    assert_extremes(extreme_singular_values(matrix), values)
    assert_extremes(extreme_singular_values(matrix.T), values)
    assert largest_singular_value(matrix) == pytest.approx(float(values.max()), rel=1e-6)


@few
@given(
    st.integers(DIRECT_SIZE + 1, DIRECT_SIZE + 30),
    st.integers(0, 60),
    st.floats(0.5, 4.5),
    seeds,
    st.integers(0, 10),
)
def test_no_start_hides_the_extremes_of_a_large_matrix(
    size: int, longer: int, exponent: float, seed: int, index: int
) -> None:
    """The start may be any vector, even a wrong singular vector, because the result is
    certified.
    """
    values = torch.logspace(0, -exponent, size, dtype=torch.float64)
    matrix = with_values((size, size + longer), values, seed)
    # The left singular vectors, as `with_values` draws them.
    wrong = torch.linalg.qr(noise(size, size, seed=seed)).Q
    start = Spectrum(1.0, 1.0, wrong[:, 1 + index].clone(), wrong[:, -2 - index].clone())
    assert_extremes(extreme_singular_values(matrix, start), values)


@bounded
@given(st.tuples(st.integers(1, 300), st.integers(1, 40)), seeds)
def test_the_gram_matrix_in_blocks_is_symmetric_and_right(
    shape: tuple[int, int], seed: int
) -> None:
    wide = noise(min(shape), max(shape), seed=seed) if seed % 2 else noise(*shape, seed=seed)
    blockwise = gram(wide)
    assert close(blockwise, blockwise.T, 1e-13)
    assert close(blockwise, wide @ wide.T, 1e-13)


@bounded
@given(sides, sides, st.integers(0, 10_000))
def test_the_condition_number_is_one_for_multiples_of_orthogonal_matrices(
    rows: int, columns: int, seed: int
) -> None:
    assume(min(rows, columns) > 1)
    matrix = 3.0 * torch.linalg.qr(noise(max(rows, columns), min(rows, columns), seed=seed)).Q
    assert extreme_singular_values(matrix).condition_number == pytest.approx(1.0, abs=1e-6)
