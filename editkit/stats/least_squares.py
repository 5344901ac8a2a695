"""The least-squares problem of a batch of edits, solved by the Woodbury identity in the number of
edits.

`solve.dtype` is the dtype of the I x I matrices: the Cholesky factors of second moments, and the
memories of D4S and AlphaEdit. At I = 14336 (LLaMA-3-8B's down_proj) such a matrix takes 1.6 GB in
float64 and 0.8 GB in float32. Second moments, their factorisation and all matrices with N columns
are always float64. tests/stats/test_solve_dtype.py measures the accuracy with float32.

Shape letters: O d_out, I d_in, N edits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.linalg.recursive import Memory, Prior

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update
    from editkit.stats.store import Moments


@dataclass(frozen=True, kw_only=True)
class LeastSquares:
    """The problem min_D ||D K - R||^2 + weight * tr(D C D^T) of one module."""

    module: str
    keys_IN: torch.Tensor
    residuals_ON: torch.Tensor
    weight: float
    # The matrix that is edited, as it is when these are called: X (I, N) -> (W - W_0) X, and W
    # (O, I). None outside of a step.
    total: Callable[[torch.Tensor], torch.Tensor] | None = None
    matrix: Callable[[], torch.Tensor] | None = None
    update: Update | None = None  # what was applied, once it was


def least_squares(problem: LeastSquares, moments: Moments) -> LowRank:
    """The solution D = R K^T (weight * C + K K^T)^-1 in float32.

    It is Eq. 14 of Meng et al. 2023 (MEMIT, arXiv 2210.07229) in the form
    R (I + K^T A K)^-1 K^T A with A = (weight * C)^-1. C is factorised once per run. A solve costs
    two triangular solves for N columns and an N x N system, instead of I^3.
    """
    return (
        Memory()
        .solve(problem.keys_IN, problem.residuals_ON, weighted(problem, moments))
        .to(dtype=torch.float32)
    )


def weighted(problem: LeastSquares, moments: Moments) -> Prior:
    """weight * C as a prior. With C = L L^T, its T is L^-1 / sqrt(weight)."""
    module, root = problem.module, math.sqrt(problem.weight)
    return Prior(
        whiten=lambda keys_IN: moments.whiten(module, keys_IN) / root,
        unwhiten=lambda white_IN: moments.unwhiten(module, white_IN) / root,
    )


def equality_constrained(problem: LeastSquares, moments: Moments, relaxation: float) -> LowRank:
    """D = R (K^T A K + relaxation I)^-1 K^T A with A = (weight C)^-1, in float64 with rank N.

    C's one factor whitens K and so gives both K^T A K and K^T A; nothing costs I^3.
    """
    prior = weighted(problem, moments)
    white_IN = prior.whiten(problem.keys_IN.double())
    # A key that is not finite reaches the update through `white_IN`: collapse is a result.
    gram_NN = torch.nan_to_num(white_IN.T @ white_IN, posinf=0.0, neginf=0.0)
    values_N, vectors_NN = torch.linalg.eigh(gram_NN)
    cutoff = 0.0 if relaxation else _cutoff(values_N)
    scale_N = torch.where(values_N > cutoff, (values_N + relaxation) ** -0.5, 0.0)
    directions_NN = vectors_NN * scale_N
    return LowRank(
        problem.residuals_ON.double() @ directions_NN, prior.unwhiten(white_IN @ directions_NN)
    )


def _cutoff(values_N: torch.Tensor) -> float:
    """The square of the rounding of float32 keys: the eigenvalues are squared singular values."""
    rounding = len(values_N) * torch.finfo(torch.float32).eps
    return rounding**2 * float(values_N[-1])
