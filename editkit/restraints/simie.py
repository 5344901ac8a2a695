"""SimIE: every edit is made on the unedited matrix, and recursive least squares merges them.

Guo et al. 2025, "Towards Lifelong Model Editing via Simulating Ideal Editor" (the published code).
The editor proposes D'_t for W_0. With P_t = lambda I + the sum of K K^T over all edits so far,

    W_t = W_{t-1} + (W_0 + D'_t - W_{t-1}) K_t K_t^T P_t^-1

so that of each edit W_t keeps what it does to its own keys. lambda is `ridge` (published: 1e4).
The inverse is kept by the recursion of `editkit.linalg.recursive`: no edit costs I^3.

The method is for any editor of weights. A restraint knows the keys of editors that solve a least
squares; for these it acts on the solve, where D'_t is the editor's own solution. Differs from the
published code in editors of several layers: while a layer is measured, the layers below hold all
merged edits, and not this one alone.

Memory: as D4S's. Shape letters: O d_out, I d_in, N edits of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from editkit.errors import OptionError, message
from editkit.linalg.recursive import memory_of, ridge, with_memory
from editkit.resources.workload import SolveMemory, Workload
from editkit.restraints.base import AbstractSolveRestraint, history_memory
from editkit.stats.least_squares import LeastSquares, least_squares

if TYPE_CHECKING:
    from editkit.linalg.lowrank import LowRank
    from editkit.stats.store import Moments
    from editkit.types import TensorState


@dataclass(frozen=True, kw_only=True)
class SimIE(AbstractSolveRestraint):
    """The merge of edits of W_0. `conf/restraint/simie.yaml` documents the option.

    Raises:
        OptionError: the ridge is not positive.
    """

    base = "unedited"  # on which each edit is proposed; no option

    ridge: float  # lambda

    def __post_init__(self) -> None:
        if not 0 < self.ridge < math.inf:
            raise OptionError(message("ridge", "must be positive", got=self.ridge))

    def memory(self, work: Workload) -> SolveMemory:
        return history_memory(work)

    def init(self, model: object, moments: Moments) -> TensorState:
        """No history. Raises ConfigError for a second moment that cannot be inverted."""
        moments.factorise_all()
        return {}

    def solve(self, problem: LeastSquares, state: TensorState, moments: Moments) -> LowRank:
        """The merged update in the residuals' dtype."""
        assert problem.total is not None, "the step knows the total"
        keys_IN = problem.keys_IN.double()
        written_ON = problem.total(problem.keys_IN).double()
        # The step has taken off what the total writes already; the editor asked for all of it.
        asked_ON = problem.residuals_ON.double() + written_ON
        alone = least_squares(replace(problem, residuals_ON=asked_ON), moments)
        own_ON = alone.left_OR.double() @ (alone.right_IR.double().T @ keys_IN)
        memory = memory_of(state, problem.module)
        update = memory.solve(keys_IN, own_ON - written_ON, ridge(self.ridge))
        return update.to(dtype=problem.residuals_ON.dtype)

    def observe(self, problem: LeastSquares, state: TensorState, moments: Moments) -> TensorState:
        """Adds the solved problem's keys to the history."""
        memory = memory_of(state, problem.module)
        memory = memory.plus(problem.keys_IN, ridge(self.ridge), dtype=moments.dtype)
        return with_memory(state, problem.module, memory)
