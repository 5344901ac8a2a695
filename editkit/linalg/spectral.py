"""Extreme singular values of a weight matrix after every edit, usually without a full singular
value decomposition.

Three routes are tried in this order, until one can verify its answer:

1. Gram matrix: warm-started Lanczos gives the certified extreme eigenvalues of G = W W^T, formed on
   the smaller side in float64 (see `lanczos`). G squares the condition number, so the smallest
   singular triplet is checked against W: G is not accurate enough if |W v - sigma u| exceeds the
   tolerance times sigma.
2. QR: the factor R of W^T = Q R has the singular values of W and is computed backward stably.
   Inverse iteration on R gives the smallest one.
3. The singular value decomposition.

Shape letters: O d_out, I d_in, M = min(O, I), N = max(O, I).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from editkit.lazy import torch
from editkit.linalg.lanczos import (
    inverse,
    lanczos,
    largest_eigenvalue,
    smallest_eigenvalue,
    start_vector,
)

TOLERANCE = 1e-6  # relative error of a singular value
# Relative error for condition numbers above LOOSE_CONDITION, where float64 limits the accuracy of
# the smallest singular value.
LOOSE_TOLERANCE = 3e-4
LOOSE_CONDITION = 2e5
# Relative error of an eigenvalue of the Gram matrix. sigma = sqrt(lambda) halves it, and the
# certificate doubles it.
EIGENVALUE_TOLERANCE = 2e-7
# Below this lambda_min / lambda_max, rounding decides whether a shifted Gram matrix is positive
# definite.
GRAM_FLOOR = 1e-9
# Up to this size all eigenvalues of the Gram matrix cost less than the overhead of the iteration.
DIRECT_SIZE = 256
QR_STEPS = 300
GRAM_BLOCKS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """The extreme singular values of one matrix, and their singular vectors (float64, length M or
    0), which warm-start the next call.
    """

    sigma_max: float
    sigma_min: float
    top_M: torch.Tensor
    bottom_M: torch.Tensor

    @property
    def condition_number(self) -> float:
        """sigma_max / sigma_min; inf if the matrix is exactly singular, nan if an entry is not
        finite.
        """
        return self.sigma_max / self.sigma_min if self.sigma_min != 0 else math.inf

    def state(self) -> dict[str, torch.Tensor]:
        """The spectrum as tensors for a checkpoint. A restored spectrum starts the next call with
        the same bits.
        """
        values = torch.tensor([self.sigma_max, self.sigma_min], dtype=torch.float64)
        return {"values": values, "top": self.top_M.cpu(), "bottom": self.bottom_M.cpu()}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Spectrum:
        """The inverse of `state`."""
        sigma_max, sigma_min = state["values"].tolist()
        return cls(sigma_max, sigma_min, state["top"], state["bottom"])


def extreme_singular_values(weight_OI: torch.Tensor, start: Spectrum | None = None) -> Spectrum:
    """The largest and the smallest of the min(O, I) singular values of a matrix.

    The result agrees with `torch.linalg.svdvals` in float64 to a relative 1e-6 for condition
    numbers up to 1e5, and to 1e-3 above. A smallest value below max(O, I) * 2.2e-16 * sigma_max is
    rounding noise with either method, because the matrix is numerically rank deficient. The result
    is deterministic. Entries that are not finite, or whose squares overflow, give nan. The call
    needs memory for two float64 copies of the matrix.

    Args:
        weight_OI: of any float dtype; not modified.
        start: the result for a nearby matrix. It saves time and changes the result by no more than
            the tolerance.
    """
    wide_MN = _wide(weight_OI)
    empty = wide_MN.new_zeros(0)
    gram_MM = gram(wide_MN)
    trace = float(gram_MM.trace())
    if not math.isfinite(trace):
        return Spectrum(math.nan, math.nan, empty, empty)
    if trace == 0.0:
        return Spectrum(0.0, 0.0, empty, empty)
    warm_top_M, warm_bottom_M = (None, None) if start is None else (start.top_M, start.bottom_M)
    sigma_max, top_M, bottom_M = _gram_extremes(gram_MM, warm_top_M, warm_bottom_M)
    sigma_min = None if bottom_M is None else _checked(wide_MN, bottom_M)
    if sigma_min is None and wide_MN.shape[0] > DIRECT_SIZE:
        sigma_min, bottom_M = _smallest_by_qr(wide_MN, sigma_max)
    if sigma_min is None:
        sigma_min = float(torch.linalg.svdvals(wide_MN)[-1])
    return Spectrum(sigma_max, sigma_min, top_M, empty if bottom_M is None else bottom_M)


def largest_singular_value(matrix_OI: torch.Tensor) -> float:
    """sigma_max of a dense matrix in float64 to a relative 1e-6; nan if an entry is not finite."""
    gram_MM = gram(_wide(matrix_OI))
    trace = float(gram_MM.trace())
    if not math.isfinite(trace) or trace == 0.0:
        return 0.0 if trace == 0.0 else math.nan
    ritz = (
        None
        if gram_MM.shape[0] <= DIRECT_SIZE
        else largest_eigenvalue(gram_MM, None, tolerance=EIGENVALUE_TOLERANCE)
    )
    return math.sqrt(ritz.value if ritz is not None else float(torch.linalg.eigvalsh(gram_MM)[-1]))


def gram(wide_MN: torch.Tensor) -> torch.Tensor:
    """W W^T, (M, M). Only the blocks on and below the diagonal are multiplied out, which saves 44 %
    of the largest cost of a step.
    """
    size = wide_MN.shape[0]
    gram_MM = wide_MN.new_empty((size, size))
    rows = max(DIRECT_SIZE // 2, -(-size // GRAM_BLOCKS))
    for first in range(0, size, rows):
        last = min(first + rows, size)
        gram_MM[first:last, :last] = wide_MN[first:last] @ wide_MN[:last].mT
        gram_MM[:first, first:last] = gram_MM[first:last, :first].mT
    return gram_MM


def _wide(weight_OI: torch.Tensor) -> torch.Tensor:
    """The matrix in float64, transposed if it has more rows than columns."""
    matrix_OI = weight_OI.detach().to(torch.float64)
    return matrix_OI if matrix_OI.shape[0] <= matrix_OI.shape[1] else matrix_OI.mT


def _gram_extremes(
    gram_MM: torch.Tensor, warm_top_M: torch.Tensor | None, warm_bottom_M: torch.Tensor | None
) -> tuple[float, torch.Tensor, torch.Tensor | None]:
    """sigma_max, its singular vector, and that of sigma_min; None for the last if the Gram matrix
    is not accurate enough.
    """
    if gram_MM.shape[0] > DIRECT_SIZE:
        top = largest_eigenvalue(gram_MM, warm_top_M, tolerance=EIGENVALUE_TOLERANCE)
        if top is not None:
            bottom = smallest_eigenvalue(
                gram_MM, warm_bottom_M, tolerance=EIGENVALUE_TOLERANCE, floor=GRAM_FLOOR * top.value
            )
            return math.sqrt(top.value), top.vector_M, None if bottom is None else bottom.vector_M
    values_M, vectors_MM = torch.linalg.eigh(gram_MM)
    return math.sqrt(float(values_M[-1])), vectors_MM[:, -1].clone(), vectors_MM[:, 0].clone()


def _checked(wide_MN: torch.Tensor, vector_M: torch.Tensor) -> float | None:
    """sigma_min = |W^T u| if u is a singular vector of W to the tolerance, else None.

    Rounding hides the vector for condition numbers above 1e5.
    """
    right_N = wide_MN.mT @ vector_M
    sigma = float(torch.linalg.vector_norm(right_N))
    # With v = W^T u / sigma, a singular value lies within |W v - sigma u| of sigma.
    residual_M = wide_MN @ right_N - sigma**2 * vector_M
    return sigma if float(torch.linalg.vector_norm(residual_M)) <= TOLERANCE * sigma**2 else None


def _smallest_by_qr(wide_MN: torch.Tensor, sigma_max: float) -> tuple[float | None, torch.Tensor]:
    """sigma_min and its left singular vector from W^T = Q R.

    The start is always cold, because no certificate protects against a misleading warm start.
    sigma_min is None unless |W^T u|, an upper bound of sigma_min, agrees with the value from R^-1.
    """
    triangle_MM = torch.linalg.qr(wide_MN.mT, mode="r").R
    # An exactly singular matrix has zeros on the diagonal. Values far below the rounding error of
    # the other entries replace them, so that the solver can divide.
    diagonal_M = triangle_MM.diagonal()
    diagonal_M.copy_(
        torch.where(diagonal_M.abs() < 1e-20 * sigma_max, 1e-20 * sigma_max, diagonal_M)
    )
    solve = inverse(triangle_MM.mT)
    ritz = lanczos(
        solve,
        start_vector(diagonal_M, None),
        max_steps=QR_STEPS,
        converged=lambda value, error: error <= EIGENVALUE_TOLERANCE * value,
    )
    # Damps the remaining components along the large singular vectors; |W^T u| would magnify them.
    vector_M = solve(ritz.vector_M)
    vector_M = vector_M / torch.linalg.vector_norm(vector_M)
    sigma = float(torch.linalg.vector_norm(wide_MN.mT @ vector_M))
    if sigma <= wide_MN.shape[1] * torch.finfo(torch.float64).eps * sigma_max:
        return sigma, vector_M  # numerically rank deficient: rounding noise with any method
    tolerance = TOLERANCE if sigma * LOOSE_CONDITION > sigma_max else LOOSE_TOLERANCE
    is_agreed = (
        ritz.error <= EIGENVALUE_TOLERANCE * ritz.value
        and abs(sigma * math.sqrt(ritz.value) - 1) <= tolerance
    )
    return (sigma if is_agreed else None), vector_M
