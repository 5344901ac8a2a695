"""The extreme singular values equal those of the full decomposition, for ill-conditioned matrices
and for every start of the iteration.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from editkit.bench import run_bench, shapes
from editkit.errors import ConfigError
from editkit.linalg.spectral import (
    DIRECT_SIZE,
    Spectrum,
    extreme_singular_values,
    gram,
    largest_singular_value,
)

WIDE, TALL, SMALL = (272, 360), (330, 260), (64, 100)
assert min(*WIDE, *TALL) > DIRECT_SIZE > min(SMALL)


def with_singular_values(
    shape: tuple[int, int], values_M: torch.Tensor, *, seed: int = 0
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    u_OM, v_IM = (
        torch.linalg.qr(torch.randn(side, min(shape), generator=generator, dtype=torch.float64)).Q
        for side in shape
    )
    return (u_OM * values_M) @ v_IM.T


def spread(shape: tuple[int, int], condition: float) -> torch.Tensor:
    return torch.logspace(0, -math.log10(condition), min(shape), dtype=torch.float64)


def assert_agrees(spectrum: Spectrum, weight_OI: torch.Tensor, *, rel: float = 1e-6) -> None:
    values_M = torch.linalg.svdvals(weight_OI.double())
    assert spectrum.sigma_max == pytest.approx(float(values_M[0]), rel=1e-6)
    assert spectrum.sigma_min == pytest.approx(float(values_M[-1]), rel=rel)
    assert spectrum.condition_number == pytest.approx(
        float(values_M[0] / values_M[-1]), rel=rel + 1e-6
    )


@pytest.mark.parametrize("shape", [WIDE, TALL, SMALL])
@pytest.mark.parametrize("exponent", range(1, 13))
def test_any_condition_number_is_measured(shape: tuple[int, int], exponent: int) -> None:
    weight_OI = with_singular_values(shape, spread(shape, 10.0**exponent))
    assert_agrees(
        extreme_singular_values(weight_OI), weight_OI, rel=1e-6 if exponent <= 5 else 1e-3
    )


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-5, 1e-6, 0.0])
@pytest.mark.parametrize("condition", [30.0, 1e8])
def test_clustered_extremes_are_distinguished(
    shape: tuple[int, int], gap: float, condition: float
) -> None:
    values_M = torch.linspace(2, 1, min(shape), dtype=torch.float64)
    values_M[:8] = 3 * (1 - gap * torch.arange(8))
    values_M[-8:] = 3 / condition * (1 + gap * torch.arange(7, -1, -1))
    weight_OI = with_singular_values(shape, values_M)
    assert_agrees(
        extreme_singular_values(weight_OI), weight_OI, rel=1e-6 if condition < 1e5 else 1e-3
    )


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_a_warm_start_at_the_wrong_singular_vector_does_not_hide_the_extreme_one(
    shape: tuple[int, int], gap: float
) -> None:
    """The worst case: the start is exactly the second singular vector, whose value is close to the
    first one's.
    """
    size = min(shape)
    values_M = torch.linspace(2, 1, size, dtype=torch.float64)
    values_M[0], values_M[1], values_M[-2], values_M[-1] = 3, 3 * (1 - gap), 0.1 * (1 + gap), 0.1
    generator = torch.Generator().manual_seed(0)
    u_OM, v_IM = (
        torch.linalg.qr(torch.randn(side, size, generator=generator, dtype=torch.float64)).Q
        for side in shape
    )
    weight_OI = (u_OM * values_M) @ v_IM.T
    shorter_MM = u_OM if shape[0] <= shape[1] else v_IM
    assert_agrees(
        extreme_singular_values(weight_OI, Spectrum(3.0, 0.1, shorter_MM[:, 1], shorter_MM[:, -2])),
        weight_OI,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("growth", [1.0, 2.5])
def test_a_sequence_of_edits_is_followed_by_warm_starts(dtype: torch.dtype, growth: float) -> None:
    """Rank-one updates. Some are small, others raise the condition number by orders of
    magnitude.
    """
    generator = torch.Generator().manual_seed(0)
    weight_OI = 0.02 * torch.randn(WIDE, generator=generator)
    spectrum, size = None, 0.1
    for _ in range(8):
        stored_OI = weight_OI.to(dtype)
        spectrum = extreme_singular_values(stored_OI, spectrum)
        cold = extreme_singular_values(stored_OI)
        assert_agrees(spectrum, stored_OI)
        assert spectrum.sigma_max == pytest.approx(cold.sigma_max, rel=1e-6)
        assert spectrum.sigma_min == pytest.approx(cold.sigma_min, rel=1e-6)
        left_O, right_I = (torch.randn(side, generator=generator) for side in WIDE)
        weight_OI = weight_OI + size * torch.outer(left_O / left_O.norm(), right_I / right_I.norm())
        size *= growth


def test_a_restored_spectrum_continues_with_the_same_bits(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(WIDE, generator=generator)
    spectrum = extreme_singular_values(weight_OI)
    save_file(spectrum.state(), tmp_path / "spectrum.safetensors")
    restored = Spectrum.from_state(load_file(tmp_path / "spectrum.safetensors"))
    edited_OI = weight_OI + torch.outer(
        torch.randn(WIDE[0], generator=generator), torch.randn(WIDE[1], generator=generator)
    )
    states = [
        extreme_singular_values(edited_OI, start).state()
        for start in (spectrum, spectrum, restored)
    ]
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])


@pytest.mark.parametrize("shape", [WIDE, TALL, SMALL])
def test_a_rank_deficient_matrix_has_an_enormous_condition_number(shape: tuple[int, int]) -> None:
    values_M = torch.linspace(1, 2, min(shape), dtype=torch.float64)
    values_M[:3] = 0
    spectrum = extreme_singular_values(with_singular_values(shape, values_M))
    assert spectrum.sigma_max == pytest.approx(2.0, rel=1e-6)
    assert spectrum.condition_number > 1e12


@pytest.mark.parametrize("shape", [WIDE, TALL, SMALL])
def test_zero_rows_and_columns_give_finite_results(shape: tuple[int, int]) -> None:
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight_OI[3], weight_OI[:, 5] = 0, 0
    spectrum = extreme_singular_values(weight_OI)
    assert spectrum.sigma_max == pytest.approx(
        float(torch.linalg.matrix_norm(weight_OI.double(), ord=2)), rel=1e-6
    )
    assert spectrum.condition_number > 1e12


def test_the_zero_matrix_and_single_rows_give_their_values() -> None:
    assert extreme_singular_values(torch.zeros(WIDE)).condition_number == math.inf
    assert extreme_singular_values(torch.zeros(SMALL)).sigma_max == 0.0
    for shape in ((1, 300), (300, 1), (1, 1)):
        weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert_agrees(extreme_singular_values(weight_OI), weight_OI)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [WIDE, SMALL])
def test_a_number_that_is_not_finite_gives_nan_and_the_next_call_recovers(
    shape: tuple[int, int], bad: float
) -> None:
    weight_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    broken_OI = weight_OI.clone()
    broken_OI[2, 3] = bad
    spectrum = extreme_singular_values(broken_OI, extreme_singular_values(weight_OI))
    assert all(
        math.isnan(value)
        for value in (spectrum.sigma_max, spectrum.sigma_min, spectrum.condition_number)
    )
    assert math.isnan(largest_singular_value(broken_OI))
    assert_agrees(
        extreme_singular_values(weight_OI, Spectrum.from_state(spectrum.state())), weight_OI
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_does_not_matter(scale: float) -> None:
    weight_OI = with_singular_values(WIDE, spread(WIDE, 1e3)) * scale
    spectrum = extreme_singular_values(weight_OI)
    assert spectrum.sigma_max == pytest.approx(scale, rel=1e-6)
    assert spectrum.condition_number == pytest.approx(1e3, rel=1e-5)


@pytest.mark.parametrize("shape", [WIDE, TALL, SMALL])
def test_the_gram_matrix_and_sigma_max_equal_the_dense_ones(shape: tuple[int, int]) -> None:
    matrix_OI = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(gram(matrix_OI), matrix_OI @ matrix_OI.T, rtol=1e-12, atol=1e-10)
    assert largest_singular_value(matrix_OI) == pytest.approx(
        float(torch.linalg.matrix_norm(matrix_OI, ord=2)), rel=1e-6
    )


def test_the_matrix_is_not_modified() -> None:
    for shape in (WIDE, TALL, SMALL):
        weight_OI = with_singular_values(shape, spread(shape, 1e7))
        before = weight_OI.clone()
        extreme_singular_values(weight_OI)
        assert torch.equal(weight_OI, before)


def test_the_benchmark_writes_both_methods(tmp_path: Path) -> None:
    result = run_bench("telemetry", "tiny-gpt2", repeats=2, folder=tmp_path)
    assert json.loads((tmp_path / "telemetry-tiny-gpt2.json").read_text()) == result
    assert result["relative_error"] < 1e-6
    assert result["ratio"] == result["plain_s"] / result["ours_s"]
    assert result["shape"] == list(shapes()["tiny-gpt2"])


def test_an_unknown_benchmark_or_shape_is_refused_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)'speed'.*telemetry.*'gpt5'.*gpt2-xl.*0"):
        run_bench("speed", "gpt5", repeats=0, folder=tmp_path)
