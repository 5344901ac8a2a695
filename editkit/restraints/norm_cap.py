"""A cap on the norm of each update, relative to the norm of the matrix that it changes.

    dW -> dW * min(1, ratio * |W| / |dW|)

with |.| the spectral or the Frobenius norm on both sides and W the matrix just before the update: a restraint on updates sees that one,
not W_0, so the cap grows with what earlier edits made of the matrix. No paper's method: the plainest restraint on an update, to compare
others with. A low-rank update stays low-rank. Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.errors import ConfigError
from editkit.linalg.lowrank import LowRank, Update, frobenius, sigma_max
from editkit.restraints.base import AbstractUpdateRestraint

if TYPE_CHECKING:
    from editkit.lazy import torch


@dataclass(frozen=True, kw_only=True)
class NormCap(AbstractUpdateRestraint):
    """Shortens an update whose norm exceeds `ratio` times the weight's.

    Raises:
        ConfigError: `ratio` is not positive.
    """

    norm: Literal["spectral", "frobenius"]
    ratio: float

    def __post_init__(self) -> None:
        if not self.ratio > 0:
            raise ConfigError(f"restraint.norm_cap.ratio must be positive - got {self.ratio}.")

    def restrain(self, update: Update, weight_OI: torch.Tensor) -> Update:
        """The update itself where it is short enough, else a multiple of it; one that is not finite stays as it is."""
        measure = sigma_max if self.norm == "spectral" else frobenius
        size = measure(update)
        # sigma_max >= |W|_F / sqrt(rank), which most updates stay below: they are spared the cost of the weight's sigma_max.
        if self.norm == "spectral" and size <= self.ratio * frobenius(weight_OI) / math.sqrt(min(weight_OI.shape)):
            return update
        limit = self.ratio * measure(weight_OI)
        if not size > limit:
            return update
        return update.scaled(limit / size) if isinstance(update, LowRank) else update * (limit / size)
