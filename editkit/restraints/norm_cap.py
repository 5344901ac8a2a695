"""A cap on the norm of each update, relative to the norm of the unedited matrix.

    dW -> dW * min(1, ratio * |W_0| / |dW|)

with |.| the spectral or the Frobenius norm on both sides. W_0 and not the matrix as it is: that one
grows with the edits, and a cap relative to it would let N aligned updates grow like (1 + ratio)^N.
No paper's method: the plainest restraint on an update, to compare others with. A low-rank update
stays low-rank. Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.errors import ConfigError
from editkit.linalg.lowrank import LowRank, Update, frobenius, sigma_max
from editkit.restraints.base import AbstractUpdateRestraint, Norms

if TYPE_CHECKING:
    from editkit.lazy import torch


@dataclass(frozen=True, kw_only=True)
class NormCap(AbstractUpdateRestraint):
    """Shortens an update whose norm exceeds `ratio` times that of W_0.

    Raises:
        ConfigError: `ratio` is not positive.
    """

    norm: Literal["spectral", "frobenius"]
    ratio: float

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise ConfigError(f"restraint.norm_cap.ratio must be positive - got {self.ratio}.")

    def restrain(self, update: Update, weight_OI: torch.Tensor, base: Norms) -> Update:
        """The update itself where it is short enough, else a multiple of it; one that is not finite
        stays as it is.
        """
        size, of_base = (
            (sigma_max(update), base.sigma_max)
            if self.norm == "spectral"
            else (frobenius(update), base.frobenius)
        )
        limit = self.ratio * of_base
        if not size > limit:
            return update
        return (
            update.scaled(limit / size) if isinstance(update, LowRank) else update * (limit / size)
        )
