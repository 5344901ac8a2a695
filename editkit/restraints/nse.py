"""NSE: an update writes into the columns of the most active neurons only, and spares earlier keys.

Jiang et al. 2024, "Neuron-Level Sequential Editing for Large Language Models" (arXiv 2410.04045;
the published code). A batch selects the neurons S, the inputs of the matrix, whose summed |k| is
largest, until they hold a share p of the sum over all neurons. With H the sum of earlier K K^T,

    D_S = R K_S^T (lambda C_SS + H_SS + K_S K_S^T)^-1        the other columns of D are 0

lambda is `editor.covariance_weight`. With p = 1 this is D4S on the trajectory: two of the three
published configurations have p = 1, which leaves the neurons out.

Differs from the published code: it solves again, up to twice, for facts whose residual at the last
layer still has a norm between two bounds (alpha and 50 to 150). A restraint on the solve sees one
problem a layer, so no fact is solved again. It also finds all targets on the unedited model;
`base: unedited` does so.

Every batch selects its own neurons, so a solve costs |S|^3. Memory: I x I x 8 bytes a matrix.

Shape letters: O d_out, I d_in, S selected of them, N edits of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.errors import OptionError, message
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.resources.workload import SolveMemory, Workload
from editkit.restraints.base import AbstractSolveRestraint, Base
from editkit.stats.least_squares import LeastSquares

if TYPE_CHECKING:
    from editkit.stats.store import Moments
    from editkit.types import TensorState


@dataclass(frozen=True, kw_only=True)
class Nse(AbstractSolveRestraint):
    """The least squares over selected neurons. `conf/restraint/nse.yaml` documents the options.

    Raises:
        OptionError: the share is out of range.
    """

    share: float  # p, in (0, 1]
    base: Base

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            expected = "above 0 and at most 1; published: 0.8 and 1"
            raise OptionError(message("share", "out of range", got=self.share, expected=expected))

    def memory(self, work: Workload) -> SolveMemory:
        matrix = work.architecture.inner**2
        kept = float(work.num_matrices * matrix * work.solve_bytes)
        return SolveMemory(kept=kept, working=3.0 * matrix * 8)

    def solve(self, problem: LeastSquares, state: TensorState, moments: Moments) -> LowRank:
        """The update in the residuals' dtype, with zeros for all other neurons."""
        keys_IN, module = problem.keys_IN.double(), problem.module
        chosen_S = selected(keys_IN, self.share)
        among = (chosen_S[:, None], chosen_S[None])
        keys_SN = keys_IN[chosen_S]
        normal_SS = problem.weight * moments.second_moment(module).to(keys_IN)[among]
        if (history_II := state.get(f"{module}.history")) is not None:
            normal_SS = normal_SS + history_II.to(keys_IN.device)[among]
        lower_SS, failed = torch.linalg.cholesky_ex(normal_SS + keys_SN @ keys_SN.T)
        # Keys that are not finite, as after a collapse, make no factor: a result, not an error.
        lower_SS = torch.where(failed > 0, torch.nan, lower_SS)
        right_IN = torch.zeros_like(keys_IN)
        right_IN[chosen_S] = torch.cholesky_solve(keys_SN, lower_SS)
        update = LowRank(problem.residuals_ON.double(), right_IN)
        return update.to(dtype=problem.residuals_ON.dtype)

    def observe(self, problem: LeastSquares, state: TensorState, moments: Moments) -> TensorState:
        """Adds K K^T of the solved problem to the history."""
        name, keys_IN = f"{problem.module}.history", problem.keys_IN.double()
        added_II = (keys_IN @ keys_IN.T).to(getattr(torch, moments.dtype))
        if (history_II := state.get(name)) is not None:
            added_II = history_II.to(added_II.device) + added_II
        return {**state, name: added_II}


def selected(keys_IN: torch.Tensor, share: float) -> torch.Tensor:
    """The fewest neurons with the largest summed |k| that hold this share of the sum, ascending."""
    scores_I = keys_IN.abs().sum(dim=1)
    sorted_I, order_I = scores_I.sort(descending=True, stable=True)
    reached_I = sorted_I.cumsum(dim=0) >= share * scores_I.sum() * (1 - 1e-12)
    count = (
        int(reached_I.int().argmax()) + 1 if share < 1 and bool(reached_I.any()) else len(order_I)
    )
    return order_I[:count].sort().values
