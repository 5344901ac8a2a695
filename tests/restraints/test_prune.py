"""PRUNE on factors equals the textbook's rebuild from a full singular value decomposition, and
changes nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from editkit.errors import OptionError
from editkit.linalg.lowrank import LowRank
from editkit.linalg.total import Total
from editkit.restraints.prune import Prune
from editkit.runner.measure import corrections

SHAPE = (30, 50)
FUNCTIONS = [("log", 1.2), ("log", 2.0), ("log", math.e), ("linear", 1.2)]


def prune(**options: Any) -> Prune:
    return Prune(
        **(
            {
                "function": "log",
                "alpha": 1.2,
                "apply_at": "evaluation",
                "every": None,
                "allow_amplify": False,
            }
            | options
        )
    )


def textbook(matrix_OI: torch.Tensor, sigma: float, function: str, alpha: float) -> torch.Tensor:
    """F(D) by the full decomposition, value by value as the formula stands in the paper."""
    u, values, vt = torch.linalg.svd(matrix_OI.double(), full_matrices=False)
    for i, value in enumerate(values.tolist()):
        if value >= sigma and function == "log":
            values[i] = math.log(value, alpha) + sigma - math.log(sigma, alpha)
        elif value >= sigma:
            values[i] = value / 2 + sigma / 2
    return u @ torch.diag(values) @ vt


def total_of(number: int, *, scale: float = 1.0, seed: int = 0, dependent: bool = False) -> Total:
    """Rank-one updates in float64; if dependent, each comes three times with other lengths."""
    generator = torch.Generator().manual_seed(seed)
    total = Total(SHAPE)
    for _ in range(number):
        left, right = (
            torch.randn(side, 1, generator=generator, dtype=torch.float64) for side in SHAPE
        )
        for length in (1.0, 0.5, -0.2) if dependent else (1.0,):
            total = total.plus(LowRank(length * scale * left, right))
    return total


def exact(total: Total) -> torch.Tensor:
    """D in float64: of the factors, not of their float32 sum."""
    if total.is_dense:
        return total.dense().double()
    return sum((block.dense() for block in total.blocks), torch.zeros(SHAPE, dtype=torch.float64))


@pytest.mark.parametrize(("function", "alpha"), FUNCTIONS)
@pytest.mark.parametrize(
    "total",
    [total_of(1), total_of(6), total_of(5, dependent=True), total_of(40)],
    ids=["one", "few", "dependent", "dense"],
)
def test_the_corrected_total_is_the_textbooks(total: Total, function: str, alpha: float) -> None:
    sigma = 0.6 * total.sigma_max()
    correction = prune(function=function, alpha=alpha).correction(total, sigma)
    assert correction is not None
    torch.testing.assert_close(
        exact(total) + correction.dense(),
        textbook(exact(total), sigma, function, alpha),
        rtol=1e-9,
        atol=1e-9 * sigma,
    )


def test_the_view_is_w0_plus_f_of_d_and_not_w0_plus_d_plus_f_of_d() -> None:
    base_OI = torch.randn(SHAPE, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    base_sigma_max = float(torch.linalg.matrix_norm(base_OI, ord=2))
    total = total_of(6)
    correction = prune().correction(total, base_sigma_max)
    assert correction is not None
    restrained_OI = textbook(exact(total), base_sigma_max, "log", 1.2)
    view_OI = base_OI + (exact(total) + correction.dense())
    torch.testing.assert_close(view_OI, base_OI + restrained_OI, rtol=1e-9, atol=1e-9)
    assert float((view_OI - (base_OI + exact(total) + restrained_OI)).norm()) > 1


def test_nothing_changes_when_nothing_exceeds_sigma_max_of_w0() -> None:
    for number in (0, 1, 6, 40):
        total = total_of(number)
        assert prune().correction(total, 1.001 * total.sigma_max() + 1e-3) is None


def test_a_view_in_which_nothing_exceeds_is_the_very_same_model() -> None:
    """Not W_0 plus a rebuilt D: there is nothing to write, so W_0 + D keeps its bits."""
    totals = {"h.0": total_of(6), "h.1": total_of(40)}
    limits = {name: 1.001 * total.sigma_max() for name, total in totals.items()}
    assert corrections(prune(), totals, limits) == {}
    assert corrections(
        prune(), totals, limits | {"h.1": 0.9 * totals["h.1"].sigma_max()}
    ).keys() == {"h.1"}


def test_the_correction_has_one_column_for_each_value_above_sigma_max_of_w0() -> None:
    total = total_of(10)
    values = total.svd()[1].tolist()
    for exceeding in (1, 4, 9):
        correction = prune().correction(total, (values[exceeding - 1] + values[exceeding]) / 2)
        assert correction is not None and correction.rank == exceeding


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(0.1, 100), st.floats(1e-9, 1e-3), st.sampled_from(FUNCTIONS))
def test_f_is_continuous_at_sigma_max_of_w0(
    sigma: float, step: float, choice: tuple[str, float]
) -> None:
    function, alpha = choice
    above = torch.tensor([sigma * (1 + step)], dtype=torch.float64)
    slope = 0.5 if function == "linear" else 1 / (sigma * math.log(alpha))
    moved = float(prune(function=function, alpha=alpha).restrained(above, sigma)) - sigma
    assert moved == pytest.approx(
        slope * sigma * step, rel=1e-2, abs=1e-9 * max(sigma, slope * sigma)
    )


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(1.05, 10), st.floats(1, 5), st.floats(1, 1e3))
def test_where_check_is_silent_f_never_enlarges_and_keeps_the_order(
    alpha: float, excess: float, ratio: float
) -> None:
    sigma = excess / math.log(alpha)
    restraint = prune(alpha=alpha)
    assert restraint.check({"layer": sigma * (1 + 1e-12)}) == []
    values = torch.tensor([sigma, sigma * ratio, sigma * ratio * 1.1], dtype=torch.float64)
    restrained = restraint.restrained(values, sigma)
    assert bool((restrained <= values * (1 + 1e-12)).all()) and bool(
        (restrained >= sigma * (1 - 1e-12)).all()
    )
    assert bool((restrained.diff() >= -1e-9).all())


def test_check_names_the_matrices_on_which_the_log_would_amplify() -> None:
    problems = prune(alpha=1.2).check({"h.0": 5.4, "h.1": 5.5})  # 1 / ln 1.2 = 5.485
    assert len(problems) == 1
    for part in ("h.0", "5.4", "5.485", "alpha", "1.203", "linear", "allow_amplify"):
        assert part in problems[0]
    assert prune(alpha=1.204).check({"h.0": 5.4}) == []


def test_amplification_can_be_allowed_and_linear_never_amplifies() -> None:
    assert prune(allow_amplify=True).check({"h.0": 0.1}) == []
    assert prune(function="linear").check({"h.0": 0.1}) == []
    total = total_of(3)
    correction = prune(allow_amplify=True).correction(total, 0.1)
    assert correction is not None
    torch.testing.assert_close(
        exact(total) + correction.dense(), textbook(exact(total), 0.1, "log", 1.2)
    )


def test_a_zero_base_matrix_has_no_logarithm_even_if_amplification_is_allowed() -> None:
    assert len(prune(allow_amplify=True).check({"h.0": 0.0})) == 1
    assert len(prune().check({"h.0": math.nan})) == 1


def test_a_total_that_is_not_finite_is_left_alone() -> None:
    assert (
        prune().correction(
            total_of(3).plus(LowRank(torch.full((30, 1), math.nan), torch.ones(50, 1))), 1.0
        )
        is None
    )


def test_the_total_is_not_modified() -> None:
    for number in (6, 40):
        total = total_of(number)
        before = total.dense()
        prune().correction(total, 1.0)
        assert torch.equal(total.dense(), before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"function": "cube"}, "function"),
        ({"alpha": 1.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"apply_at": "sometimes"}, "apply_at"),
        ({"apply_at": "every"}, "every"),
        ({"apply_at": "every", "every": 0}, "every"),
        ({"apply_at": "end", "every": 5}, "every"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(OptionError) as raised:
        prune(**options)
    assert raised.value.problems[-1].startswith(f"{named}: ")


def test_all_wrong_options_are_named_at_once_and_the_value_is_frozen() -> None:
    with pytest.raises(OptionError) as raised:
        prune(function="cube", alpha=0.5, apply_at="every")
    assert [problem.partition(": ")[0] for problem in raised.value.problems] == [
        "function",
        "alpha",
        "every",
    ]
    with pytest.raises(dataclasses.FrozenInstanceError):
        prune().alpha = 2.0  # type: ignore[misc]
    assert prune(apply_at="every", every=5).place == "total"
