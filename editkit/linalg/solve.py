"""The least squares behind a batch of edits, by Woodbury in the number of edits.

Shape letters: O d_out, I d_in, N edits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank

if TYPE_CHECKING:
    from editkit.restraints.base import LeastSquares
    from editkit.stats.store import Moments


def least_squares(problem: LeastSquares, moments: Moments) -> LowRank:
    """argmin_D ||D K - R||^2 + weight * tr(D C D^T) = R K^T (weight * C + K K^T)^-1, in float64, returned in float32.

    Meng et al. 2023 (MEMIT, arXiv 2210.07229), Eq. 14, in the form R (weight * I + K^T C^-1 K)^-1 K^T C^-1: C is factorised once a run, a
    solve costs two triangular solves for N columns and an N x N system instead of I^3.
    """
    keys_IN, residuals_ON = problem.keys_IN.double(), problem.residuals_ON.double()
    whitened_IN = moments.inverse_times(problem.module, keys_IN)
    system_NN = problem.weight * torch.eye(keys_IN.shape[1], dtype=torch.float64, device=keys_IN.device) + keys_IN.T @ whitened_IN
    left_ON = torch.linalg.solve(system_NN, residuals_ON.T).T  # the system is symmetric
    return LowRank(left_ON.float(), whitened_IN.float())
