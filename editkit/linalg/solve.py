"""The least squares behind a batch of edits, by Woodbury in the number of edits.

Shape letters: O d_out, I d_in, N edits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.linalg.recursive import Memory, Prior

if TYPE_CHECKING:
    from editkit.linalg.lowrank import LowRank
    from editkit.restraints.base import LeastSquares
    from editkit.stats.store import Moments


def least_squares(problem: LeastSquares, moments: Moments) -> LowRank:
    """argmin_D ||D K - R||^2 + weight * tr(D C D^T) = R K^T (weight * C + K K^T)^-1, in float64, returned in float32.

    Meng et al. 2023 (MEMIT, arXiv 2210.07229), Eq. 14, in the form R (I + K^T A K)^-1 K^T A with A = (weight * C)^-1: C is factorised once
    a run, a solve costs two triangular solves for N columns and an N x N system instead of I^3.
    """
    return Memory().solve(problem.keys_IN, problem.residuals_ON, weighted(problem, moments)).to(dtype=torch.float32)


def weighted(problem: LeastSquares, moments: Moments) -> Prior:
    """keys (I, N) -> (weight * C)^-1 keys."""

    def prior(keys_IN: torch.Tensor) -> torch.Tensor:
        return moments.inverse_times(problem.module, keys_IN) / problem.weight

    return prior
