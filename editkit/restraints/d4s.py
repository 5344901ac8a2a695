"""D4S, "dump for sequence": each update solves the least squares over all edits so far, as if they
had come in one batch.

Huang et al. 2024, "Reasons and Solutions for the Decline in Model Performance after Editing" (arXiv
2410.23843). With all keys so far, G = sum K K^T and S the sum of residual times key measured at
W_0, the edited matrix is W_0 + S (lambda C + G)^-1: MEMIT's solution for the whole sequence, from
two sums whose size does not depend on its length.

Here residuals are measured on the model as it is. The same matrix is then reached by adding
R K^T (lambda C + G)^-1 to the current matrix (proof in `editkit.linalg.recursive`). The first sum
is the current matrix itself. Of the second sum only the inverse is stored, in whitened coordinates.

Differs from the authors' code: it restores W_0 after every edit and adds the whole solution again,
which costs I^3 operations an edit. There the residual is the one at W_0; here it is that of the
edited model, for which the target was searched. It measures the residual once for all layers and so
writes it 2.28 times for five layers; `editor.spread=published_code` does the same.

Memory: I x I x 8 bytes a matrix (0.33 GB at GPT-2 XL, 1.6 GB at LLaMA-3-8B) and 32 columns. Until
the factor has a quarter of I columns, 2 x I x 8 bytes an edit. `solve.dtype=float32` halves it.

Shape letters: O d_out, I d_in, N edits of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.linalg.recursive import memory_numbers, memory_of, with_memory
from editkit.resources.workload import SolveMemory, Workload
from editkit.restraints.base import AbstractSolveRestraint
from editkit.stats.least_squares import LeastSquares, weighted

if TYPE_CHECKING:
    from editkit.linalg.lowrank import LowRank
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments
    from editkit.types import TensorState


@dataclass(frozen=True, kw_only=True)
class D4S(AbstractSolveRestraint):
    """The history of keys joins lambda C in the least squares."""

    def memory(self, work: Workload) -> SolveMemory:
        size = work.architecture.inner
        numbers, is_matrix = memory_numbers(size, work.edits)
        return SolveMemory(
            kept=work.num_matrices * numbers * work.solve_bytes,
            working=float(size * size * work.solve_bytes) if is_matrix else 0.0,
        )

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """No history. Raises ConfigError for a second moment that cannot be inverted."""
        for module in moments.by_module:
            moments.factorise(module)
        return {}

    def solve(self, problem: LeastSquares, state: TensorState, moments: Moments) -> LowRank:
        """R K^T (lambda C + G)^-1, with these keys in G; in the residuals' dtype."""
        memory, prior = memory_of(state, problem.module), weighted(problem, moments)
        update = memory.solve(problem.keys_IN, problem.residuals_ON, prior)
        return update.to(dtype=problem.residuals_ON.dtype)

    def observe(self, problem: LeastSquares, state: TensorState, moments: Moments) -> TensorState:
        """Adds the solved problem's keys to the history. They are not measured again."""
        prior = weighted(problem, moments)
        memory = memory_of(state, problem.module).plus(problem.keys_IN, prior, dtype=moments.dtype)
        return with_memory(state, problem.module, memory)
