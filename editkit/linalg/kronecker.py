"""The directions in which a Kronecker-factored curvature is small.

For a matrix W with inputs x and gradients g of its outputs, the curvature of a loss in W is about
A (x) B with A = E[x x^T] and B = E[g g^T] (K-FAC, Martens & Grosse 2015, arXiv 1503.05671). With
A = U_A diag(a) U_A^T and B = U_B diag(b) U_B^T its eigenvalues are b_i a_j, with the eigenvectors
u_i v_j^T as matrices. No matrix of size O I x O I is formed.

Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

from dataclasses import dataclass

from editkit.lazy import torch


@dataclass(frozen=True, slots=True, eq=False)
class LowCurvature:
    """The projection onto the eigenvectors whose eigenvalues are small."""

    left_OO: torch.Tensor  # U_B
    right_II: torch.Tensor  # U_A
    is_low_OI: torch.Tensor

    def __call__(self, matrix_OI: torch.Tensor) -> torch.Tensor:
        """U_B ((U_B^T X U_A) * M) U_A^T in the dtype of X."""
        left_OO, right_II = self.left_OO.to(matrix_OI), self.right_II.to(matrix_OI)
        inner_OI = (left_OO.T @ matrix_OI @ right_II) * self.is_low_OI.to(matrix_OI)
        return left_OO @ inner_OI @ right_II.T


def low_curvature(a_II: torch.Tensor, b_OO: torch.Tensor, energy: float) -> LowCurvature:
    """The projection that leaves out the largest eigenvalues: the fewest that hold the share
    `energy` of their sum, and all that are as large.
    """
    a_I, right_II = torch.linalg.eigh(a_II.double())
    b_O, left_OO = torch.linalg.eigh(b_OO.double())
    products_OI = torch.outer(b_O.clamp_min(0), a_I.clamp_min(0))
    sorted_N = products_OI.flatten().sort(descending=True).values
    held_N = sorted_N.cumsum(dim=0)
    place = int((held_N < energy * held_N[-1] * (1 - 1e-12)).sum())
    return LowCurvature(left_OO, right_II, products_OI < sorted_N[min(place, len(sorted_N) - 1)])
