"""D4S, "dump for sequence": each update solves the least squares over all edits so far, as if they
had come in one batch.

Huang et al. 2024, "Reasons and Solutions for the Decline in Model Performance after Editing" (arXiv
2410.23843). With all keys so far, G = sum K K^T and S the sum of residual times key measured at
W_0, the edited matrix is W_0 + S (lambda C + G)^-1: MEMIT's solution for the whole sequence, from
two sums whose size does not depend on its length.

Here residuals are measured on the model as it is, and so the same matrix is reached by adding R K^T
(lambda C + G)^-1 to what is there (the proof is in `editkit.linalg.recursive`): the first sum is
the current matrix itself, and of the second only the inverse is kept, in coordinates in which
common text's keys are white.

Differs from the authors' code: it restores W_0 after every edit and adds the whole solution again,
for I^3 operations an edit; there the residual is the one at W_0, here that of the edited model, for
which the target was searched; and it measures the residual once for all layers, which writes it
2.28 times for five layers. The last is the editor's to choose: `editor.spread=published_code`.

Memory: I x I x 8 bytes a matrix (0.33 GB at GPT-2 XL, 1.6 GB at LLaMA-3-8B) and 32 columns, I x 8
bytes an edit until a quarter of that is reached; half of it with `solve.dtype=float32`.

Shape letters: O d_out, I d_in, N edits of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.linalg.recursive import memory_of, with_memory
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

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """No history. A second moment that cannot be inverted is found here (ConfigError), before
        the first edit.
        """
        for module in moments.by_module:
            moments.factorise(module)
        return {}

    def solve(self, problem: LeastSquares, state: TensorState, moments: Moments) -> LowRank:
        """R K^T (lambda C + G)^-1, G with these keys in it, given in the residuals' dtype."""
        memory = memory_of(state, problem.module)
        return memory.solve(problem.keys_IN, problem.residuals_ON, weighted(problem, moments)).to(
            dtype=problem.residuals_ON.dtype
        )

    def observe(self, problem: LeastSquares, state: TensorState, moments: Moments) -> TensorState:
        """The keys that were solved for join the history; they are not measured again, as in the
        authors' code.
        """
        memory = memory_of(state, problem.module).plus(
            problem.keys_IN, weighted(problem, moments), dtype=moments.dtype
        )
        return with_memory(state, problem.module, memory)
