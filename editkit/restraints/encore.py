"""ENCORE's Frobenius term: MEMIT's least squares over earlier keys, with a ridge on the update.

Gupta et al. 2025, "Lifelong Knowledge Editing requires Better Regularization" (arXiv 2502.01636,
Findings of EMNLP 2025; the published code). With H the sum of K K^T over earlier edits, unscaled,

    D = R K^T (lambda C + lambda_n I + H + K K^T)^-1

lambda is `editor.covariance_weight`, lambda_n `frobenius`: the weight of |D|_F^2. The residual is
that of the model as earlier edits left it. ENCORE also ends each search early: `restraint=mpes`.

C has one eigendecomposition a run, which gives (lambda C + lambda_n I)^-1 for every lambda. The
memory of keys is that of D4S (`editkit.linalg.recursive`): no edit costs I^3.

Shape letters: I d_in, N edits of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.errors import OptionError, message
from editkit.lazy import torch
from editkit.linalg.recursive import Prior, memory_numbers, memory_of, times, with_memory
from editkit.resources.workload import SolveMemory, Workload
from editkit.restraints.base import AbstractSolveRestraint
from editkit.stats.least_squares import LeastSquares

if TYPE_CHECKING:
    from editkit.linalg.lowrank import LowRank
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments
    from editkit.types import TensorState


@dataclass(frozen=True, kw_only=True)
class Encore(AbstractSolveRestraint):
    """The Frobenius term and the history of keys: `conf/restraint/encore.yaml`.

    Raises:
        OptionError: the weight is not positive.
    """

    frobenius: float  # lambda_n

    def __post_init__(self) -> None:
        if not 0 < self.frobenius < math.inf:
            raise OptionError(message("frobenius", "must be positive", got=self.frobenius))

    def memory(self, work: Workload) -> SolveMemory:
        """The history as for D4S, and the eigenvectors of C, found in float64."""
        size = work.architecture.inner
        numbers, _ = memory_numbers(size, work.edits)
        kept = work.num_matrices * (numbers + size * size) * work.solve_bytes
        return SolveMemory(kept=kept, working=float(3 * size * size * 8))

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """The eigenvalues and eigenvectors of each C."""
        state: dict[str, torch.Tensor] = {}
        for module in moments.by_module:
            values_I, vectors_II = torch.linalg.eigh(moments.second_moment(module))
            state[f"{module}.eigenvalues"] = values_I
            # A product depends in its last bits on the layout, and a checkpoint keeps none.
            vectors_II = vectors_II.to(getattr(torch, moments.dtype)).contiguous()
            state[f"{module}.eigenvectors"] = vectors_II
        return state

    def solve(self, problem: LeastSquares, state: TensorState, moments: Moments) -> LowRank:
        """R K^T (lambda C + lambda_n I + H + K K^T)^-1, in the residuals' dtype."""
        memory = memory_of(state, problem.module)
        update = memory.solve(problem.keys_IN, problem.residuals_ON, self._prior(problem, state))
        return update.to(dtype=problem.residuals_ON.dtype)

    def observe(self, problem: LeastSquares, state: TensorState, moments: Moments) -> TensorState:
        """Adds the solved problem's keys to the history."""
        prior, module = self._prior(problem, state), problem.module
        memory = memory_of(state, module).plus(problem.keys_IN, prior, dtype=moments.dtype)
        return with_memory(state, module, memory)

    def _prior(self, problem: LeastSquares, state: TensorState) -> Prior:
        """lambda C + lambda_n I: T is U^T over the roots of its eigenvalues."""
        device = problem.keys_IN.device
        values_I = state[f"{problem.module}.eigenvalues"].to(device).clamp_min(0)
        vectors_II = state[f"{problem.module}.eigenvectors"].to(device)
        root_I1 = (problem.weight * values_I + self.frobenius).sqrt()[:, None]
        return Prior(
            whiten=lambda keys_IN: times(vectors_II.T, keys_IN) / root_I1,
            unwhiten=lambda white_IN: times(vectors_II, white_IN / root_I1),
        )
