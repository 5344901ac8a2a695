"""A total is the bitwise sum of its updates in order, in either form, and also if it was saved and
restored at any point.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from editkit.linalg.lowrank import LowRank
from editkit.linalg.spectral import extreme_singular_values
from editkit.linalg.telemetry import module_record
from editkit.linalg.total import Total

SHAPE = (24, 40)  # dense from rank 15 on
RECORDED = {
    *("condition_number", "sigma_max", "sigma_min", "l1_norm", "l1_mean", "frobenius"),
    *(
        "update_frobenius",
        "update_sigma_max",
        "total_frobenius",
        "total_sigma_max",
        "rounding_error",
    ),
}


def updates(
    number: int, *, rank: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[LowRank]:
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRank(*(torch.randn(side, rank, generator=generator).to(dtype) for side in SHAPE))
        for _ in range(number)
    ]


def total_of(parts: list[LowRank]) -> Total:
    total = Total(SHAPE)
    for part in parts:
        total = total.plus(part)
    return total


def added_one_by_one(parts: list[LowRank]) -> torch.Tensor:
    matrix_OI = torch.zeros(SHAPE)
    for part in parts:
        matrix_OI += part.dense().float()
    return matrix_OI


@pytest.mark.parametrize("number", [0, 1, 9, 14, 15, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dense_is_bitwise_the_sequential_float32_sum(number: int, dtype: torch.dtype) -> None:
    parts = updates(number, dtype=dtype)
    assert torch.equal(total_of(parts).dense(), added_one_by_one(parts))


def test_a_total_stays_dense_once_the_factors_are_larger_than_the_matrix() -> None:
    totals = [total_of(updates(number)) for number in (14, 15, 16)]
    assert [total.is_dense for total in totals] == [False, True, True]
    assert [total.rank for total in totals] == [14, 24, 24]
    assert Total(SHAPE).plus(torch.ones(SHAPE)).plus(updates(1)[0]).is_dense


def test_adding_changes_neither_the_total_nor_the_update() -> None:
    for total in (total_of(updates(3)), total_of(updates(30))):
        before, update = total.dense(), torch.ones(SHAPE)
        after = total.plus(update)
        after.dense().zero_()
        assert torch.equal(total.dense(), before)
        assert torch.equal(after.dense(), before + 1)
        assert torch.equal(update, torch.ones(SHAPE))


@pytest.mark.parametrize("number", [0, 1, 9, 14, 15])
def test_a_restored_total_continues_with_the_same_bits(number: int, tmp_path: Path) -> None:
    parts = updates(number, rank=2)[: number // 2] + updates(number - number // 2, seed=1)
    total = total_of(parts)
    save_file(
        {name: tensor.contiguous() for name, tensor in total.state().items()},
        tmp_path / "total.safetensors",
    )
    restored = Total.from_state(SHAPE, load_file(tmp_path / "total.safetensors"))
    assert torch.equal(restored.dense(), total.dense())
    assert [block.rank for block in restored.blocks] == [block.rank for block in total.blocks]
    later = updates(12, seed=5)
    for part in later:
        total, restored = total.plus(part), restored.plus(part)
        assert torch.equal(restored.dense(), total.dense())
    assert torch.equal(total.dense(), added_one_by_one([*parts, *later]))


def test_a_saved_total_keeps_the_dtype_of_each_block() -> None:
    total = total_of([*updates(2, rank=3), *updates(2, rank=2, dtype=torch.float64, seed=1)])
    restored = Total.from_state(SHAPE, total.state())
    assert [block.dtype for block in restored.blocks] == [
        torch.float32,
        torch.float32,
        torch.float64,
        torch.float64,
    ]
    assert torch.equal(restored.dense(), total.dense())


@pytest.mark.parametrize("number", [0, 5, 30])
def test_norms_and_svd_equal_those_of_the_dense_matrix(number: int) -> None:
    total = total_of(updates(number))
    matrix_OI = total.dense().double()
    assert total.frobenius() == pytest.approx(float(torch.linalg.matrix_norm(matrix_OI)), rel=1e-6)
    assert total.sigma_max() == pytest.approx(
        float(torch.linalg.matrix_norm(matrix_OI, ord=2)), rel=1e-6
    )
    u_OK, s_K, v_IK = total.svd()
    torch.testing.assert_close((u_OK * s_K) @ v_IK.T, matrix_OI, rtol=1e-5, atol=1e-5)
    assert torch.equal(total.to(device="cpu").dense(), total.dense())


def test_a_total_that_is_not_finite_has_nan_norms() -> None:
    for number in (3, 30):
        total = total_of([*updates(number), updates(1)[0].scaled(math.inf)])
        assert not total.is_finite()
        assert math.isnan(total.frobenius()) and math.isnan(total.sigma_max())


def test_an_update_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\) does not fit a total of shape \(24, 40\)"):
        Total(SHAPE).plus(torch.zeros(3, 4))


def test_the_record_of_a_module_holds_the_figures_of_its_matrices() -> None:
    weight_OI = torch.randn(SHAPE, generator=torch.Generator().manual_seed(7))
    parts = updates(3)
    total = total_of(parts)
    record = module_record(
        weight_OI, extreme_singular_values(weight_OI, None), parts[-1], total, rounding_error=0.25
    )
    values = torch.linalg.svdvals(weight_OI.double())
    assert set(record) == RECORDED
    assert record["condition_number"] == pytest.approx(float(values[0] / values[-1]), rel=1e-6)
    assert record["sigma_max"] == pytest.approx(float(values[0]), rel=1e-6)
    assert record["sigma_min"] == pytest.approx(float(values[-1]), rel=1e-6)
    assert record["l1_norm"] == pytest.approx(float(weight_OI.double().abs().sum()))
    assert record["l1_mean"] == pytest.approx(float(weight_OI.double().abs().mean()))
    assert record["frobenius"] == pytest.approx(float(weight_OI.double().norm()))
    assert record["update_frobenius"] == pytest.approx(
        float(parts[-1].dense().double().norm()), rel=1e-6
    )
    assert record["update_sigma_max"] == pytest.approx(record["update_frobenius"])  # rank one
    assert record["total_frobenius"] == pytest.approx(total.frobenius())
    assert record["total_sigma_max"] == pytest.approx(total.sigma_max())
    assert record["rounding_error"] == 0.25


def test_the_record_of_the_unedited_module_has_zeros_for_update_and_total() -> None:
    weight_OI = torch.randn(SHAPE)
    record = module_record(weight_OI, extreme_singular_values(weight_OI, None), None, Total(SHAPE))
    zeros = {name for name, value in record.items() if value == 0}
    assert zeros == {
        "update_frobenius",
        "update_sigma_max",
        "total_frobenius",
        "total_sigma_max",
        "rounding_error",
    }
