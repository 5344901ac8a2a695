"""NAS: the target vector gets the norm that target vectors have on the unedited model.

"Norm-anchored" targets (arXiv 2602.02543; the published code). With v_0 the MLP's output at the
subject's last token and v* = v_0 + delta the result of a search,

    v* <- mu v* / |v*|        mu = the mean of |v*| over searches on the unedited model, without
                              the largest 5 %
    target = h - v_0 + v*     at a block's output h, as MEMIT searches

mu belongs to a model, a layer and the numbers of its search. `norm` holds it.

Differs from the paper: `variant: published_code` takes an edit back (v* = v_0) whose |v*| exceeds
2 mu, which the paper does not mention.

Shape letters: N requests, O width of the target vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.errors import ConfigError, OptionError, message
from editkit.lazy import torch
from editkit.restraints.base import AbstractObjectiveRestraint

if TYPE_CHECKING:
    from editkit.targets.descent import Descent, TargetProblem
    from editkit.targets.objective import Site

LARGEST = 2.0  # times mu, from which the published code takes an edit back


@dataclass(frozen=True, kw_only=True)
class Nas(AbstractObjectiveRestraint):
    """Rescales each target vector. `conf/restraint/nas.yaml` documents the options.

    Raises:
        OptionError: an option is out of range.
    """

    norm: float  # mu
    variant: Literal["paper", "published_code"]

    def __post_init__(self) -> None:
        if not 0 < self.norm < math.inf:
            raise OptionError(message("norm", "must be positive and finite", got=self.norm))

    def search(self, problem: TargetProblem, *, request_ids: Sequence[str], site: Site) -> Descent:
        """The plain descent, and one more loss at the rescaled target vectors.

        Raises:
            ConfigError: the block does not add its MLP's output to the residual stream unchanged.
        """
        first = problem.descend(updates=problem.settings.steps - 1)
        initial_NO = problem.initial_NO
        if site == "block":
            if problem.mlp_outputs is None:
                text = "the model's blocks change the MLP's output before they add it"
                raise ConfigError(message("restraint.nas", text))
            initial_NO = problem.mlp_outputs()
        vectors_NO = initial_NO + first.delta_NO
        sizes_N1 = torch.linalg.vector_norm(vectors_NO, dim=1, keepdim=True)
        scaled_NO = vectors_NO * (self.norm / sizes_N1) - initial_NO
        if self.variant == "published_code":
            scaled_NO = torch.where(sizes_N1 > LARGEST * self.norm, 0.0, scaled_NO)
        return problem.descend(
            updates=0, after=first, among_N=first.is_finite_N, start_NO=scaled_NO
        )


def anchor(norms_N: torch.Tensor) -> float:
    """mu of the norms of many target vectors: their mean without the largest 5 %."""
    kept = len(norms_N) - int(0.05 * len(norms_N))
    return float(norms_N.double().sort().values[:kept].mean())
