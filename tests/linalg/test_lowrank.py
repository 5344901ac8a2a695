"""Every operation on factors equals the same operation on dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.linalg import lowrank
from editkit.linalg.lowrank import CORE_RANK, LowRank

bounded = settings(max_examples=30, deadline=None, derandomize=True)
sides = st.integers(1, 24)


def random_update(rows: int, columns: int, rank: int, *, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randn(side, rank, generator=generator, dtype=torch.float64)
        for side in (rows, columns)
    )
    return LowRank(left, right)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@bounded
@given(sides, sides, st.integers(0, 30), st.integers(0, 5))
def test_sums_scalings_and_negation_equal_the_dense_results(
    rows: int, columns: int, first_rank: int, second_rank: int
) -> None:
    first, second = (
        random_update(rows, columns, first_rank),
        random_update(rows, columns, second_rank, seed=1),
    )
    assert_close((first + second).dense(), first.dense() + second.dense())
    assert_close((-first).dense(), -first.dense())
    assert_close(first.scaled(0.3).dense(), 0.3 * first.dense())
    assert (first + second).rank == first_rank + second_rank
    assert first.shape == (rows, columns) == tuple(first.dense().shape)


@bounded
@given(sides, sides, st.integers(0, 30))
def test_norms_equal_the_dense_results(rows: int, columns: int, rank: int) -> None:
    update = random_update(rows, columns, rank)
    assert update.frobenius() == pytest.approx(
        float(torch.linalg.matrix_norm(update.dense())), rel=1e-10
    )
    assert update.sigma_max() == pytest.approx(
        float(torch.linalg.matrix_norm(update.dense(), ord=2)), rel=1e-10
    )


@bounded
@given(sides, sides, st.integers(0, 30))
def test_svd_is_a_decomposition_with_orthonormal_vectors_in_descending_order(
    rows: int, columns: int, rank: int
) -> None:
    update = random_update(rows, columns, rank)
    u_OK, s_K, v_IK = update.svd()
    kept = min(rank, rows, columns)
    assert s_K.shape == (kept,)
    assert_close((u_OK * s_K) @ v_IK.T, update.dense())
    assert_close(u_OK.T @ u_OK, torch.eye(kept, dtype=torch.float64))
    assert_close(v_IK.T @ v_IK, torch.eye(kept, dtype=torch.float64))
    assert torch.equal(s_K, s_K.sort(descending=True).values)


def test_compress_drops_the_rank_of_repeated_columns() -> None:
    update = random_update(20, 30, 3)
    repeated = update + update.scaled(0.5) + update
    compressed = repeated.compress(1e-12)
    assert (repeated.rank, compressed.rank) == (9, 3)
    assert_close(compressed.dense(), 2.5 * update.dense())
    assert (update + -update).compress(1e-10).sigma_max() < 1e-12


def test_sigma_max_of_many_columns_agrees_with_the_dense_matrix() -> None:
    update = random_update(300, 400, 2 * CORE_RANK)
    assert update.sigma_max() == pytest.approx(
        float(torch.linalg.matrix_norm(update.dense(), ord=2)), rel=1e-9
    )


def test_sigma_max_of_many_equal_singular_values_is_found() -> None:
    orthonormal_OR = torch.linalg.qr(
        torch.randn(400, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ).Q
    assert LowRank(orthonormal_OR, 3 * orthonormal_OR).sigma_max() == pytest.approx(3.0, rel=1e-10)
    assert LowRank(torch.zeros(400, 200), torch.zeros(400, 200)).sigma_max() == 0.0


def test_dense_has_the_same_bits_whatever_the_strides() -> None:
    generator = torch.Generator().manual_seed(0)
    left_OR, right_IR = (
        torch.randn(33, 7, generator=generator),
        torch.randn(65, 7, generator=generator),
    )
    strided = LowRank(left_OR.T.contiguous().T, right_IR.T.contiguous().T)
    assert torch.equal(strided.dense(), LowRank(left_OR, right_IR).dense())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_gives_nan_and_no_exception(bad: float) -> None:
    update = random_update(6, 8, 2)
    update.left_OR[3, 1] = bad
    for broken in (update, update.dense()):
        assert not lowrank.is_finite(broken)
        assert math.isnan(lowrank.frobenius(broken))
        assert math.isnan(lowrank.sigma_max(broken))


def test_helpers_give_the_same_result_for_factors_and_matrices() -> None:
    update = random_update(6, 8, 2)
    assert lowrank.dense(update.dense()) is not None
    assert_close(lowrank.dense(update), lowrank.dense(update.dense()))
    assert lowrank.frobenius(update) == pytest.approx(lowrank.frobenius(update.dense()))
    assert lowrank.sigma_max(update) == pytest.approx(lowrank.sigma_max(update.dense()))
    assert lowrank.is_finite(update) and lowrank.is_finite(update.dense())


def test_factors_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(O, R\) and \(I, R\), got \(4, 2\) and \(5, 3\)"):
        LowRank(torch.zeros(4, 2), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="one dtype"):
        LowRank(torch.zeros(4, 2), torch.zeros(5, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\(4, 5\) and \(5, 4\)"):
        LowRank(torch.zeros(4, 1), torch.zeros(5, 1)) + LowRank(
            torch.zeros(5, 1), torch.zeros(4, 1)
        )
