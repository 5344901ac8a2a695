"""A cap on the norm of each update, relative to the norm of the unedited matrix.

    dW -> dW * min(1, ratio * |W_0| / |dW|)

|.| is the spectral or the Frobenius norm on both sides. The cap is relative to W_0 because the
current matrix grows with the edits: a cap relative to that matrix would let N aligned updates grow
like (1 + ratio)^N. No paper proposes this method. It is the plainest restraint on an update, to
compare others with. A low-rank update stays low-rank.

Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.errors import OptionError, message
from editkit.linalg.lowrank import LowRank, Update, frobenius, sigma_max
from editkit.restraints.base import AbstractUpdateRestraint, Norms

if TYPE_CHECKING:
    from editkit.lazy import torch


@dataclass(frozen=True, kw_only=True)
class NormCap(AbstractUpdateRestraint):
    """Scales down an update whose norm exceeds `ratio` times the norm of W_0.

    Raises:
        OptionError: `ratio` is not positive.
    """

    norm: Literal["spectral", "frobenius"]
    ratio: float

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise OptionError(message("ratio", "must be positive", got=self.ratio))

    def restrain(self, update: Update, weight_OI: torch.Tensor, base: Norms) -> Update:
        """The update itself, or a multiple of it. An update that is not finite is unchanged."""
        if self.norm == "spectral":
            size, limit = sigma_max(update), self.ratio * base.sigma_max
        else:
            size, limit = frobenius(update), self.ratio * base.frobenius
        if not size > limit:
            return update
        share = limit / size
        return update.scaled(share) if isinstance(update, LowRank) else update * share
