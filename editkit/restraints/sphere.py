"""SPHERE: an update is damped along the principal directions of the matrix's rows.

Liu et al. 2026, "Energy-Regularized Sequential Model Editing on Hyperspheres" (ICLR 2026,
arXiv 2510.01172 and its code). With A the rows of the present W, each of length one, and U the
leading eigenvectors of A^T A / O that hold a share `energy` of the sum of its eigenvalues,

    D <- D (I - alpha U U^T)

alpha: 0.5 on AlphaEdit, 0.8 on MEMIT, PRUNE and RECT (published). Each layer's update is damped
before the residual of the next is measured, as in the authors' code; EasyEdit's port damps all
layers at the end, after residuals of undamped updates.

The eigenvectors come from the smaller of A A^T and A^T A (a thin SVD of A), not from I x I.

A low-rank update stays low-rank. Shape letters: O d_out, I d_in, R leading directions.
"""

from __future__ import annotations

from dataclasses import dataclass

from editkit.errors import OptionError, message
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank, Update
from editkit.restraints.base import AbstractUpdateRestraint, Norms


@dataclass(frozen=True, kw_only=True)
class Sphere(AbstractUpdateRestraint):
    """Damps an update along the directions that W uses most.

    Raises:
        OptionError: an option is out of range.
    """

    energy: float  # share of the eigenvalues' sum, in (0, 1]
    alpha: float  # 1: nothing is left along these directions

    def __post_init__(self) -> None:
        problems = [
            message(name, "out of range", got=getattr(self, name), expected="above 0, at most 1")
            for name in ("energy", "alpha")
            if not 0 < getattr(self, name) <= 1
        ]
        if problems:
            raise OptionError(problems)

    def restrain(self, update: Update, weight_OI: torch.Tensor, base: Norms) -> Update:
        """The damped update in its own dtype."""
        directions_IR = leading_directions(weight_OI, self.energy)

        def damped(rows_NI: torch.Tensor) -> torch.Tensor:
            wide_NI = rows_NI.to(directions_IR)
            along_NI = (wide_NI @ directions_IR) @ directions_IR.T
            return (wide_NI - self.alpha * along_NI).to(rows_NI)

        if isinstance(update, LowRank):
            return LowRank(update.left_OR, damped(update.right_IR.T).T)
        return damped(update)


def leading_directions(weight_OI: torch.Tensor, energy: float) -> torch.Tensor:
    """(I, R) float64: the fewest leading eigenvectors of A^T A that hold this share. A row of zeros
    has no direction and stays zero.
    """
    rows_OI = torch.nn.functional.normalize(weight_OI.double(), dim=1, eps=1e-300)
    is_wide = rows_OI.shape[0] < rows_OI.shape[1]
    gram = rows_OI @ rows_OI.T if is_wide else rows_OI.T @ rows_OI
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    reached = values.cumsum(0) >= energy * values.sum() * (1 - 1e-12)
    # Rounding leaves no direction to the eigenvalues below it.
    rank = int((values > values[0] * len(values) * torch.finfo(torch.float64).eps).sum())
    count = min(int(reached.int().argmax()) + 1, rank)
    leading: torch.Tensor = vectors[:, :count]
    return (rows_OI.T @ leading) / values[:count].sqrt() if is_wide else leading
