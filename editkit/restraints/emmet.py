"""EMMET's constraint in another editor's least squares: the targets are met exactly, and of all
updates that do so, the one is taken that changes the outputs for common text least.

Gupta et al. 2024, "A Unified Framework for Model Editing" (arXiv 2403.14236):

    D = R (K^T A K + lambda I)^-1 K^T A        A = (w C)^-1, w `editor.covariance_weight`

On MEMIT it is EMMET. lambda is `relaxation`; the published code has 0.1 for batches of more than
one request, with which this is MEMIT with the weight w lambda (`editkit.editors.emmet`). With 0 the
constraint is exact.

Shape letters: O d_out, I d_in, N edits of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.errors import OptionError, message
from editkit.restraints.base import AbstractSolveRestraint
from editkit.stats.least_squares import LeastSquares, equality_constrained

if TYPE_CHECKING:
    from editkit.linalg.lowrank import LowRank
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments
    from editkit.types import TensorState


@dataclass(frozen=True, kw_only=True)
class EmmetConstraint(AbstractSolveRestraint):
    """Equality constraints. `conf/restraint/emmet.yaml` documents the option.

    Raises:
        OptionError: the relaxation is negative.
    """

    relaxation: float  # lambda

    def __post_init__(self) -> None:
        if not self.relaxation >= 0:
            got, expected = self.relaxation, "0 or more"
            problem = "must not be negative"
            raise OptionError(message("relaxation", problem, got=got, expected=expected))

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """No state. Raises ConfigError for a second moment that cannot be inverted."""
        moments.factorise_all()
        return {}

    def solve(self, problem: LeastSquares, state: TensorState, moments: Moments) -> LowRank:
        """The update in the residuals' dtype. A batch of one request has no relaxation."""
        relaxation = self.relaxation if problem.keys_IN.shape[1] > 1 else 0.0
        update = equality_constrained(problem, moments, relaxation)
        return update.to(dtype=problem.residuals_ON.dtype)
