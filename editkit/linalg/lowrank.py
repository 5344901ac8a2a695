"""Updates of weight matrices as values: low-rank factors while the rank is small, a dense matrix
otherwise.

Shape letters: O d_out, I d_in, R rank (number of columns of the factors), K = min(R, O, I).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from editkit.lazy import torch
from editkit.linalg.lanczos import lanczos, start_vector
from editkit.linalg.spectral import largest_singular_value

if TYPE_CHECKING:
    from typing import Any

# Up to this rank sigma_max comes from an R x R eigenproblem. Above it, a few products with the
# factors are cheaper.
CORE_RANK = 128
LANCZOS_STEPS = 200
LANCZOS_TOLERANCE = 1e-10  # of sigma_max squared


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The matrix left_OR @ right_IR.T. Only `dense` multiplies it out. Rank 0 is the zero matrix.

    Raises:
        ValueError: the factors are not matrices with the same number of columns, or differ in dtype
            or device.
    """

    left_OR: torch.Tensor
    right_IR: torch.Tensor

    def __post_init__(self) -> None:
        left, right = self.left_OR, self.right_IR
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[1]:
            shapes = f"{tuple(left.shape)} and {tuple(right.shape)}"
            raise ValueError(f"LowRank needs factors (O, R) and (I, R), got {shapes}")
        if left.dtype != right.dtype or left.device != right.device:
            places = f"{left.dtype} on {left.device} and {right.dtype} on {right.device}"
            raise ValueError(f"LowRank needs factors of one dtype on one device, got {places}")

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.left_OR.shape[0], self.right_IR.shape[0]

    @property
    def rank(self) -> int:
        """The number of columns of the factors: an upper bound of the matrix's rank."""
        return self.left_OR.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both factors."""
        return self.left_OR.dtype

    @property
    def device(self) -> torch.device:
        """The device of both factors."""
        return self.left_OR.device

    def dense(self) -> torch.Tensor:
        """The matrix itself, (O, I), in the factors' dtype.

        It costs O * I * R multiplications and memory for O * I values.
        """
        # Contiguous factors: the bits of a product may depend on the strides.
        return self.left_OR.contiguous() @ self.right_IR.contiguous().mT

    def __add__(self, other: LowRank) -> LowRank:
        """The sum, of rank R1 + R2, in the wider of the two dtypes."""
        if self.shape != other.shape:
            raise ValueError(
                f"LowRank matrices of shapes {self.shape} and {other.shape} cannot be added"
            )
        return LowRank(
            torch.cat([self.left_OR, other.left_OR], dim=1),
            torch.cat([self.right_IR, other.right_IR], dim=1),
        )

    def __neg__(self) -> LowRank:
        return LowRank(-self.left_OR, self.right_IR)

    def scaled(self, factor: float) -> LowRank:
        """factor times this matrix."""
        return LowRank(factor * self.left_OR, self.right_IR)

    def to(self, *, device: Any = None, dtype: torch.dtype | None = None) -> LowRank:
        """The same matrix on another device or in another dtype."""
        device, dtype = device or self.device, dtype or self.dtype
        return LowRank(
            self.left_OR.to(device=device, dtype=dtype),
            self.right_IR.to(device=device, dtype=dtype),
        )

    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(u_OK, s_K, v_IK) in float64 with u diag(s) v^T equal to the matrix and s descending.

        Computed from QR decompositions of the factors and the SVD of an R x R core.
        """
        left, right = (
            torch.linalg.qr(self.left_OR.double()),
            torch.linalg.qr(self.right_IR.double()),
        )
        u_KK, s_K, vt_KK = torch.linalg.svd(left.R @ right.R.mT, full_matrices=False)
        return left.Q @ u_KK, s_K, right.Q @ vt_KK.mT

    def compress(self, rtol: float) -> LowRank:
        """This matrix without its singular values at or below rtol * sigma_max, in the factors'
        dtype. The error in the spectral norm is at most rtol * sigma_max.
        """
        u_OK, s_K, v_IK = self.svd()
        kept = int((s_K > rtol * s_K.max()).sum()) if s_K.numel() else 0
        return LowRank((u_OK * s_K)[:, :kept].to(self.dtype), v_IK[:, :kept].to(self.dtype))

    def frobenius(self) -> float:
        """The Frobenius norm in float64, from the Gram matrices of the factors.

        The absolute error is about 1e-8 |left| |right| if columns cancel.
        """
        left_RR, right_RR = self._grams()
        return (
            math.sqrt(max(float((left_RR * right_RR).sum()), 0.0)) if self.is_finite() else math.nan
        )

    def sigma_max(self) -> float:
        """The largest singular value in float64, with the error of `frobenius`; nan if a factor is
        not finite.
        """
        if not self.is_finite():
            return math.nan
        if self.rank > CORE_RANK:
            sigma = self._sigma_max_by_lanczos()
            if sigma is not None:
                return sigma
        if self.rank == 0:
            return 0.0
        left_RR, right_RR = self._grams()
        values_R, vectors_RR = torch.linalg.eigh(left_RR)
        root_RR = vectors_RR * values_R.clamp_min(0).sqrt()  # left^T left = root root^T
        return math.sqrt(
            max(float(torch.linalg.eigvalsh(root_RR.mT @ right_RR @ root_RR)[-1]), 0.0)
        )

    def is_finite(self) -> bool:
        """Whether no factor holds a nan or an infinity."""
        return bool(torch.isfinite(self.left_OR).all()) and bool(
            torch.isfinite(self.right_IR).all()
        )

    def _grams(self) -> tuple[torch.Tensor, torch.Tensor]:
        left_OR, right_IR = self.left_OR.double(), self.right_IR.double()
        return left_OR.mT @ left_OR, right_IR.mT @ right_IR

    def _sigma_max_by_lanczos(self) -> float | None:
        left_OR, right_IR = self.left_OR.double(), self.right_IR.double()
        ritz = lanczos(
            lambda x_O: left_OR @ (right_IR.mT @ (right_IR @ (left_OR.mT @ x_O))),
            start_vector(left_OR[:, 0], None),
            max_steps=LANCZOS_STEPS,
            converged=lambda value, error: error <= LANCZOS_TOLERANCE * abs(value),
        )
        return (
            math.sqrt(max(ritz.value, 0.0))
            if ritz.error <= LANCZOS_TOLERANCE * abs(ritz.value)
            else None
        )


Update: TypeAlias = "LowRank | torch.Tensor"


def dense(update: Update) -> torch.Tensor:
    """The update as an (O, I) matrix."""
    return update.dense() if isinstance(update, LowRank) else update


def frobenius(update: Update) -> float:
    """The Frobenius norm in float64; nan if the update is not finite."""
    if isinstance(update, LowRank):
        return update.frobenius()
    norm = float(torch.linalg.vector_norm(update, dtype=torch.float64))
    return norm if math.isfinite(norm) else math.nan


def sigma_max(update: Update) -> float:
    """The largest singular value to a relative 1e-6; nan if the update is not finite."""
    return update.sigma_max() if isinstance(update, LowRank) else largest_singular_value(update)


def is_finite(update: Update) -> bool:
    """Whether the update holds no nan and no infinity."""
    return update.is_finite() if isinstance(update, LowRank) else bool(torch.isfinite(update).all())
