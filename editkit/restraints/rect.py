"""RECT: of an update, only the entries with the largest relative change.

Gu et al. 2024, "Model Editing Harms General Abilities of Large Language Models: Regularization to
the Rescue" (arXiv 2401.04700). With W the matrix before the update, a share `keep` of all entries
of dW keeps its value: the entries with the largest |dW| / |W|. The other entries become zero.

    keep = 0.2    the authors' code (on ROME)
    keep = 0.4    the AlphaEdit authors' code (on MEMIT)

Differs from published code: the denominator is |W| + epsilon. The first code has no epsilon. The
second has W + epsilon, which vanishes at W = -epsilon. The first code never runs as it was
released, because the block stands in a string literal. The second masks the updates of all layers
after the last one was computed; here the update of a layer is masked before the residual of the
next layer is measured.

The result is dense. Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

from dataclasses import dataclass

from editkit.errors import OptionError, message
from editkit.lazy import torch
from editkit.linalg.lowrank import Update, dense
from editkit.restraints.base import AbstractUpdateRestraint, Norms


@dataclass(frozen=True, kw_only=True)
class Rect(AbstractUpdateRestraint):
    """Keeps the largest relative changes.

    Raises:
        OptionError: an option is out of range.
    """

    keep: float  # share of the entries, in (0, 1]
    epsilon: float

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.keep <= 1:
            expected = "a share of the entries, above 0 and at most 1; published: 0.2, 0.4"
            problems.append(message("keep", "out of range", got=self.keep, expected=expected))
        if not self.epsilon > 0:
            expected = "a positive number, since a weight may be zero; published: 1e-8"
            problems.append(
                message("epsilon", "must be positive", got=self.epsilon, expected=expected)
            )
        if problems:
            raise OptionError(problems)

    def restrain(self, update: Update, weight_OI: torch.Tensor, base: Norms) -> torch.Tensor:
        """The update, (O, I) float32, with all but the largest relative changes set to zero; ties
        with the last that stays, stay too.
        """
        update_OI = dense(update).float()
        change_OI = update_OI.abs() / (weight_OI.to(update_OI.device).float().abs() + self.epsilon)
        num_dropped = change_OI.numel() - max(1, round(self.keep * change_OI.numel()))
        if num_dropped == 0:
            return update_OI.clone()
        # The smallest change that is kept. An update that is not finite stays so: the runner
        # reports it.
        smallest = change_OI.flatten().kthvalue(num_dropped + 1).values
        return torch.where(change_OI < smallest, 0.0, update_OI)
