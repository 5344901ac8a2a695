"""RECT: of an update, only the entries that change the weight most, relative to what is there.

Gu et al. 2024, "Model Editing Harms General Abilities of Large Language Models: Regularization to
the Rescue" (arXiv 2401.04700). With W the matrix before the update, the entries of dW with the
largest |dW| / |W| stay as they are, a share `keep` of all; the others become zero.

    keep = 0.2    the authors' code (on ROME)
    keep = 0.4    the AlphaEdit authors' code (on MEMIT)

Differs from published code: the denominator is |W| + epsilon; the first has no epsilon, the second
W + epsilon, which vanishes at W = -epsilon. The first, as shipped, never runs (the block stands in
a string literal). The second masks the updates of all layers after the last one is computed; here
each layer's is masked before the next layer measures what is left to write.

An update is dense afterwards, whatever it was before. Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

from dataclasses import dataclass

from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.linalg.lowrank import Update, dense
from editkit.restraints.base import AbstractUpdateRestraint, Norms


@dataclass(frozen=True, kw_only=True)
class Rect(AbstractUpdateRestraint):
    """Keeps the largest relative changes.

    Raises:
        ConfigError: an option is out of range.
    """

    keep: float  # share of the entries, in (0, 1]
    epsilon: float

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.keep <= 1:
            problems.append(
                f"restraint.rect.keep: a share of the entries, above 0 and at most 1 - got {self.keep} - published: 0.2, 0.4."
            )
        if not self.epsilon > 0:
            problems.append(
                f"restraint.rect.epsilon must be positive: a weight may be zero - got {self.epsilon} - published: 1e-8."
            )
        if problems:
            raise ConfigError(problems)

    def restrain(self, update: Update, weight_OI: torch.Tensor, base: Norms) -> torch.Tensor:
        """The update, (O, I) float32, with all but the largest relative changes set to zero; ties
        with the last that stays, stay too.
        """
        update_OI = dense(update).float()
        change_OI = update_OI.abs() / (weight_OI.to(update_OI.device).float().abs() + self.epsilon)
        num_dropped = change_OI.numel() - max(1, round(self.keep * change_OI.numel()))
        if num_dropped == 0:
            return update_OI.clone()
        # The smallest that stays; an update that is not finite stays not finite, for the runner to
        # see.
        smallest = change_OI.flatten().kthvalue(num_dropped + 1).values
        return torch.where(change_OI < smallest, 0.0, update_OI)
