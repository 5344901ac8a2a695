"""MOSE: the matrix is turned, W <- R W with an orthogonal R, so that its norm and its condition
number stay.

Xu et al. 2026, "Multiplicative Orthogonal Sequential Editing for Language Models" (AAAI 2026). Of
all orthogonal R the update takes the minimiser of the orthogonal Procrustes problem

    |R W K - V*|^2 + beta tr((R - I) W C W^T (R - I)^T)       V* = W K + residual
    R = U V^T        with U S V^T = svd(V* (W K)^T + beta W C W^T)

beta is `editor.covariance_weight`. W is the present matrix, so that W_N = R_N ... R_1 W_0. The
update (R - I) W is dense. Other restraints on updates or totals break the turn.

The closed form is editkit's, for the paper's description; the paper's own weighting of its two
terms was not checked. Differs from the published code: it has no Procrustes solution, but trains a
block-diagonal rotation of the inputs, W R, by Adam.

Shape letters: O d_out, I d_in, N edits of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.resources.workload import SolveMemory, Workload
from editkit.restraints.base import AbstractSolveRestraint
from editkit.stats.least_squares import LeastSquares

if TYPE_CHECKING:
    from editkit.stats.store import Moments
    from editkit.types import TensorState


@dataclass(frozen=True, kw_only=True)
class Mose(AbstractSolveRestraint):
    """The turn that meets the targets best. It has no options."""

    def memory(self, work: Workload) -> SolveMemory:
        size = work.architecture
        return SolveMemory(working=8.0 * (2 * size.inner * size.width + 5 * size.width**2))

    def solve(self, problem: LeastSquares, state: TensorState, moments: Moments) -> torch.Tensor:
        """(R - I) W in the residuals' dtype."""
        assert problem.matrix is not None, "the step knows the matrix"
        matrix_OI = problem.matrix().double()
        outputs_ON = matrix_OI @ problem.keys_IN.double()
        wanted_ON = outputs_ON + problem.residuals_ON.double()
        c_II = moments.second_moment(problem.module).to(matrix_OI.device)
        common_OO = matrix_OI @ c_II @ matrix_OI.T
        cross_OO = wanted_ON @ outputs_ON.T + problem.weight * common_OO
        if not bool(cross_OO.isfinite().all()):  # as after a collapse: a result, not an error
            return torch.full_like(problem.residuals_ON[:, :1] * matrix_OI[:1], torch.nan)
        left_OO, _, right_OO = torch.linalg.svd(cross_OO)
        turned_OI: torch.Tensor = left_OO @ (right_OO @ matrix_OI)
        return (turned_OI - matrix_OI).to(problem.residuals_ON.dtype)
