"""Extreme singular values of a weight matrix after every edit, without a singular value
decomposition after every edit.

Three routes, the first that can vouch for its answer wins:

1. Gram: G = W W^T on the smaller side in float64, its extreme eigenvalues by warm-started Lanczos,
certified (see `lanczos`).
   G squares the condition number, so the smallest singular triplet is then checked against W
   itself: if |W v - sigma u| exceeds the tolerance times sigma, G can no longer tell.
2. QR: W^T = Q R has R with the singular values of W, backward stably; inverse iteration on the
triangle R finds the smallest. 3. The singular value decomposition.

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

TOLERANCE = 1e-6  # of a singular value, relative
LOOSE_TOLERANCE = (
    3e-4  # beyond LOOSE_CONDITION, where float64 itself begins to blur the smallest one
)
LOOSE_CONDITION = 2e5
# of an eigenvalue of the Gram matrix: sigma = sqrt(lambda) halves it, the certificate doubles it
EIGENVALUE_TOLERANCE = 2e-7
# lambda_min / lambda_max below which rounding decides whether a shifted Gram matrix is positive
# definite
GRAM_FLOOR = 1e-9
DIRECT_SIZE = (
    256  # up to here all eigenvalues of the Gram matrix cost less than the iteration's overhead
)
QR_STEPS = 300
GRAM_BLOCKS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Spectrum:
    """The extreme singular values of one matrix, and the singular vectors that warm-start the next
    call (float64, length M or 0).
    """

    sigma_max: float
    sigma_min: float
    top_M: torch.Tensor
    bottom_M: torch.Tensor

    @property
    def condition_number(self) -> float:
        """sigma_max / sigma_min; inf if the matrix is exactly singular, nan if it holds a
        non-finite value.
        """
        return self.sigma_max / self.sigma_min if self.sigma_min != 0 else math.inf

    def state(self) -> dict[str, torch.Tensor]:
        """All of it as tensors, for checkpoints: the next call gives the same bits from the
        restored value.
        """
        values = torch.tensor([self.sigma_max, self.sigma_min], dtype=torch.float64)
        return {"values": values, "top": self.top_M.cpu(), "bottom": self.bottom_M.cpu()}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Spectrum:
        """The inverse of `state`."""
        sigma_max, sigma_min = state["values"].tolist()
        return cls(sigma_max, sigma_min, state["top"], state["bottom"])


def extreme_singular_values(weight_OI: torch.Tensor, start: Spectrum | None = None) -> Spectrum:
    """The largest and the smallest of the min(O, I) singular values of a matrix of any float dtype
    (not modified).

    Agrees with `torch.linalg.svdvals` in float64 to 1e-6 relative up to condition numbers of 1e5
    and to 1e-3 beyond; below max(O, I) * 2.2e-16 * sigma_max the matrix is numerically rank
    deficient and the smallest value is rounding noise in both. `start` is the result for a nearby
    matrix: it saves time and does not change the result beyond the tolerance. Deterministic.
    Non-finite entries (or entries whose squares overflow) give nan. Takes memory for two float64
    copies of the matrix.
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
    """sigma_max of a dense matrix to 1e-6 relative, in float64; nan if an entry is not finite."""
    gram_MM = gram(_wide(matrix_OI))
    trace = float(gram_MM.trace())
    if not math.isfinite(trace) or trace == 0.0:
        return 0.0 if trace == 0.0 else math.nan
    found = (
        None
        if gram_MM.shape[0] <= DIRECT_SIZE
        else largest_eigenvalue(gram_MM, None, tolerance=EIGENVALUE_TOLERANCE)
    )
    return math.sqrt(
        found.value if found is not None else float(torch.linalg.eigvalsh(gram_MM)[-1])
    )


def gram(wide_MN: torch.Tensor) -> torch.Tensor:
    """W W^T, (M, M): only the blocks on and below the diagonal are multiplied out, which saves 44 %
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
    """The matrix in float64, transposed if need be so that its rows are the shorter side."""
    matrix_OI = weight_OI.detach().to(torch.float64)
    return matrix_OI if matrix_OI.shape[0] <= matrix_OI.shape[1] else matrix_OI.mT


def _gram_extremes(
    gram_MM: torch.Tensor, warm_top_M: torch.Tensor | None, warm_bottom_M: torch.Tensor | None
) -> tuple[float, torch.Tensor, torch.Tensor | None]:
    """sigma_max, its vector, and the vector of sigma_min unless the Gram matrix cannot tell."""
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
    """sigma_min = |W^T u| if W itself agrees that u is a singular vector; else None (beyond
    condition numbers of 1e5 rounding hides it).
    """
    right_N = wide_MN.mT @ vector_M
    sigma = float(torch.linalg.vector_norm(right_N))
    # With v = W^T u / sigma, a singular value lies within |W v - sigma u| of sigma.
    residual_M = wide_MN @ right_N - sigma**2 * vector_M
    return sigma if float(torch.linalg.vector_norm(residual_M)) <= TOLERANCE * sigma**2 else None


def _smallest_by_qr(wide_MN: torch.Tensor, sigma_max: float) -> tuple[float | None, torch.Tensor]:
    """sigma_min and its left vector from W^T = Q R, always from the cold start: here no certificate
    guards against a warm one.

    None unless |W^T u|, which is never below sigma_min, agrees with what the inverse of R says.
    """
    triangle_MM = torch.linalg.qr(wide_MN.mT, mode="r").R
    # An exactly singular matrix has zeros on the diagonal. Filled in far below the rounding error
    # of the others, they can be divided by.
    diagonal_M = triangle_MM.diagonal()
    diagonal_M.copy_(
        torch.where(diagonal_M.abs() < 1e-20 * sigma_max, 1e-20 * sigma_max, diagonal_M)
    )
    solve = inverse(triangle_MM.mT)
    found = lanczos(
        solve,
        start_vector(diagonal_M, None),
        max_steps=QR_STEPS,
        converged=lambda value, error: error <= EIGENVALUE_TOLERANCE * value,
    )
    vector_M = solve(
        found.vector_M
    )  # damps what is left of the large singular vectors, which |W^T u| would magnify
    vector_M = vector_M / torch.linalg.vector_norm(vector_M)
    sigma = float(torch.linalg.vector_norm(wide_MN.mT @ vector_M))
    if sigma <= wide_MN.shape[1] * torch.finfo(torch.float64).eps * sigma_max:
        return sigma, vector_M  # numerically rank deficient: rounding noise by any method
    tolerance = TOLERANCE if sigma * LOOSE_CONDITION > sigma_max else LOOSE_TOLERANCE
    is_agreed = (
        found.error <= EIGENVALUE_TOLERANCE * found.value
        and abs(sigma * math.sqrt(found.value) - 1) <= tolerance
    )
    return (sigma if is_agreed else None), vector_M
