"""EMMET: a batch of facts under equality constraints (Gupta et al. 2024, arXiv 2403.14236).

ROME's objective for a batch: of all updates with D K = R the one that changes the outputs for
common keys least, tr(D C D^T). With MEMIT's keys K and its share R of the residual in each layer,

    D = R (K^T A K + lambda I)^-1 K^T A        A = (w C)^-1; the paper has lambda = 0

The published code adds lambda = 0.1 for batches of more than one request, so that nearly equal keys
give no large updates; so does editkit. With lambda > 0, D is MEMIT's update with the weight
w lambda (Woodbury): restraints on the solve therefore act on MEMIT, and not on EMMET. With
lambda = 0, w cancels, and the update of one request is ROME's.

Differs from the published code: with lambda = 0 it inverts K^T A K, and takes the pseudo-inverse
only if that raises an error. Here the pseudo-inverse leaves out what lies below the rounding of
float32 keys: equal keys with different targets get the mean of their residuals.

Shape letters: O d_out, I d_in, N requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from editkit.editors.spread import AbstractSpread, SpreadPlan
from editkit.errors import message
from editkit.lazy import torch
from editkit.restraints.base import Place
from editkit.stats.least_squares import equality_constrained

if TYPE_CHECKING:
    from editkit.editors.base import Step
    from editkit.linalg.lowrank import LowRank
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments
    from editkit.types import TensorState


@dataclass(frozen=True, kw_only=True)
class Emmet(AbstractSpread):
    """Equality-constrained mass editing. The options are documented in `conf/editor/emmet.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"objective", "update", "total"})

    relaxation: float  # lambda, published as emmet_lambda

    def problems(self) -> list[str]:
        problems = super().problems()
        if not self.relaxation >= 0:
            problems.append(message("relaxation", "must not be negative", got=self.relaxation))
        return problems

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """No state. Raises ConfigError for a second moment that cannot be inverted."""
        for module in self.moment_modules(model):
            moments.factorise(module)
        return {}

    def site(self, model: EditableModel) -> str:
        return model.family.block(self.layers[-1])

    def propose(self, step: Step, module: str, plan: SpreadPlan) -> LowRank:
        relaxation = self.relaxation if len(step.requests) > 1 else 0.0
        problem = self.problem(step, module, plan)
        return equality_constrained(problem, step.moments, relaxation).to(dtype=torch.float32)
