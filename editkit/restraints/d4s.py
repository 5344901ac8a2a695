"""D4S, "dump for sequence": each update solves the least squares over all edits so far, as if they
had come in one batch.

Huang et al. 2024, "Reasons and Solutions for the Decline in Model Performance after Editing" (arXiv
2410.23843). With G the sum of K K^T and S the sum of R K^T over all edits so far (Eqs. 10 and 11),
the edited matrix is W_0 + D with D = S (lambda C + G)^-1 (Eq. 13): MEMIT's solution for the whole
sequence, from two sums whose size does not depend on its length.

`base` is the model on which an edit's target, keys K and residual R are measured:

    unedited      Before an edit, every edited matrix is set to W_0. The target is searched there.
                  Each layer's K and R are measured with all edits so far, this one included, in the
                  layers below, and W_0 in this layer and above. So do the authors' code and Eq. 13.
    trajectory    The model is as the earlier edits left it. R is what this model lacks; S has
                  R + D K in its place.

With `unedited`, one edited layer and the lowest of several hold exactly what one MEMIT batch of all
edits writes. A higher layer differs: a batch measures it above all edits, a sequence above the
edits made by then, and O(1) memory keeps no key to measure again.

`trajectory` feeds back: each target is found on a model that the earlier edits have changed, whose
hidden states have grown, and so the deltas grow too. docs/guides/restraints.md has the figures.

Both are solved alike. A residual relative to the matrix with its total is R - D K (with `unedited`
the step subtracts D K), and adding (R - D K) K^T (lambda C + G)^-1 to D gives the new solution
(proof in `editkit.linalg.recursive`). S is not stored, because it is D (lambda C + G). Of the other
sum only the inverse is stored, in whitened coordinates. The authors' code solves for the whole D
after every edit, which costs I^3 operations.

Differs from the authors' code: it measures the residual once for all layers and so writes it 2.28
times for five layers; the paper has MEMIT's spread. `editor.spread=published_code` does the same.

Memory: I x I x 8 bytes a matrix (0.33 GB at GPT-2 XL, 1.6 GB at LLaMA-3-8B) and 32 columns. Until
the factor has a quarter of I columns, 2 x I x 8 bytes an edit. `solve.dtype=float32` halves it.

Shape letters: O d_out, I d_in, N edits of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.linalg.recursive import memory_of, with_memory
from editkit.resources.workload import SolveMemory, Workload
from editkit.restraints.base import AbstractSolveRestraint, Base, history_memory
from editkit.stats.least_squares import LeastSquares, weighted

if TYPE_CHECKING:
    from editkit.linalg.lowrank import LowRank
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments
    from editkit.types import TensorState


@dataclass(frozen=True, kw_only=True)
class D4S(AbstractSolveRestraint):
    """The history of keys joins lambda C in the least squares. `conf/restraint/d4s.yaml` documents
    the option.
    """

    base: Base = "trajectory"  # of configurations from before this option; the yaml has unedited

    def memory(self, work: Workload) -> SolveMemory:
        return history_memory(work)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """No history. Raises ConfigError for a second moment that cannot be inverted."""
        moments.factorise_all()
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
