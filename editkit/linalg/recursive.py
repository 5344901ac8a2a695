"""Recursive least squares: a ridge regression over all keys of a run, in memory that does not grow
with the number of keys.

With the keys so far K_1 ... K_t and a prior A_0, the memory is A_t = A_0 + sum_s K_s K_s^T. If each
residual R_t is measured on the current matrix, W_0 + D_{t-1}, the ridge solution over all edits
changes by

    D_t - D_{t-1} = R_t K_t^T A_t^-1 = R_t (I + K_t^T A_{t-1}^-1 K_t)^-1 K_t^T A_{t-1}^-1

since D_t A_t = sum_s (R_s + D_{s-1} K_s) K_s^T = D_{t-1} A_{t-1} + D_{t-1} K_t K_t^T + R_t K_t^T =
D_{t-1} A_t + R_t K_t^T. Only A_t^-1 K is ever needed; the sum of R K^T need not be kept.

The memory is stored in the prior's coordinates. With A_0^-1 = T^T T and keys H = T K,

    A_t^-1 = T^T M_t T        M_t = (I + sum_s H_s H_s^T)^-1 = B - F F^T

by the Woodbury identity (Golub & Van Loan, Matrix Computations, 4th ed., 2.1.4). B begins as the
identity, which is not stored. F gains one column per key and is folded into B once it is too wide.
A solve therefore costs O(J^2) per key, and no edit costs J^3. M's eigenvalues lie between 0 and 1
however ill-conditioned A_0 is. For this reason M is stored instead of A_t^-1, and float32 suffices.

Shape letters: O d_out, I d_in, J coordinates of the prior, N keys of a batch, R columns of the
factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank

if TYPE_CHECKING:
    from editkit.types import TensorState

# Largest width of F without a matrix B, as a share of J. A solve reads F twice and B once per key.
WIDEST_FACTOR = 0.25
# Largest width of F with a matrix B. Writing a new B costs more than reading it in every solve.
FOLDED_COLUMNS = 32

SolveDtype = Literal["float32", "float64"]


@dataclass(frozen=True, slots=True, eq=False)
class Prior:
    """A prior A_0, given by a matrix T with A_0^-1 = T^T T.

    Both functions take and return float64; they may compute in another dtype.
    """

    whiten: Callable[[torch.Tensor], torch.Tensor]  # X (I, N) -> T X (J, N)
    unwhiten: Callable[[torch.Tensor], torch.Tensor]  # X (J, N) -> T^T X (I, N)


def ridge(weight: float) -> Prior:
    """weight * I as a prior: the plain ridge regression."""
    root = math.sqrt(weight)
    return Prior(whiten=lambda keys_IN: keys_IN / root, unwhiten=lambda white_IN: white_IN / root)


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """(A_0 + sum K K^T)^-1 over all keys added so far. Immutable: `plus` returns a new memory."""

    factor_JR: torch.Tensor | None = None  # F
    base_JJ: torch.Tensor | None = None  # B; None is the identity

    def inverse_times(self, keys_IN: torch.Tensor, prior: Prior) -> torch.Tensor:
        """(A_0 + sum K K^T)^-1 @ keys, (I, N) float64."""
        return prior.unwhiten(self._times(prior.whiten(keys_IN.double())))

    def plus(self, keys_IN: torch.Tensor, prior: Prior, *, dtype: SolveDtype = "float64") -> Memory:
        """The memory with more keys. `dtype` is its storage dtype, the same in all calls."""
        _, columns_JN = self._woodbury(prior.whiten(keys_IN.double()))
        # A product depends in its last bits on the layout, and a checkpoint keeps none.
        columns_JN = columns_JN.to(getattr(torch, dtype)).contiguous()
        factor_JR = (
            columns_JN
            if self.factor_JR is None
            else torch.cat([self.factor_JR.to(columns_JN.device), columns_JN], dim=1)
        )
        size, width = factor_JR.shape
        if width <= (WIDEST_FACTOR * size if self.base_JJ is None else FOLDED_COLUMNS):
            return Memory(factor_JR, self.base_JJ)
        if self.base_JJ is not None:
            return Memory(
                base_JJ=torch.addmm(
                    self.base_JJ.to(factor_JR.device), factor_JR, factor_JR.T, alpha=-1
                )
            )
        base_JJ = (factor_JR @ factor_JR.T).neg_()
        base_JJ.diagonal().add_(1)
        return Memory(base_JJ=base_JJ)

    def solve(self, keys_IN: torch.Tensor, residuals_ON: torch.Tensor, prior: Prior) -> LowRank:
        """R K^T (A + K K^T)^-1 in float64 with rank N, where A is the memory without these keys."""
        lower_NN, columns_JN = self._woodbury(prior.whiten(keys_IN.double()))
        left_ON = torch.linalg.solve_triangular(lower_NN, residuals_ON.double().T, upper=False).T
        return LowRank(left_ON, prior.unwhiten(columns_JN))

    def _times(self, white_JN: torch.Tensor) -> torch.Tensor:
        """M @ white_JN."""
        image_JN = (
            white_JN if self.base_JJ is None else times(self.base_JJ.to(white_JN.device), white_JN)
        )
        if self.factor_JR is None:
            return image_JN
        factor_JR = self.factor_JR.to(white_JN.device)
        return image_JN - times(factor_JR, times(factor_JR.T, white_JN))

    def _woodbury(self, white_JN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """L with L L^T = I + H^T M H, and M H L^-T.

        Both sides of every product get half of the inverse of the N x N system. In float64 one side
        could carry the whole inverse, but nearly cancelling columns lose their digits in float32
        factors.
        """
        image_JN = self._times(white_JN)
        gram_NN = white_JN.T @ image_JN
        core_NN = (gram_NN + gram_NN.T) / 2 + torch.eye(
            white_JN.shape[1], dtype=gram_NN.dtype, device=gram_NN.device
        )
        lower_NN, failed = torch.linalg.cholesky_ex(core_NN)
        # The factorisation fails if a key is not finite, as after a model collapse. Collapse is a
        # result, not an error.
        lower_NN = torch.where(failed > 0, torch.nan, lower_NN)
        return lower_NN, torch.linalg.solve_triangular(lower_NN, image_JN.T, upper=False).T


def memory_numbers(size: int, num_keys: int) -> tuple[float, bool]:
    """The number of values in a memory of `num_keys` keys, and whether they are a size x size
    matrix.

    A factor counts twice, because the former one still exists while the next one is built.
    """
    widest = WIDEST_FACTOR * size
    if num_keys > widest:
        return float(size * size), True
    return 2.0 * num_keys * size, False


def times(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """matrix @ columns in float64, computed in the matrix's dtype."""
    return (matrix @ columns.to(matrix.dtype)).double()


def memory_of(state: TensorState, name: str) -> Memory:
    """The memory that `with_memory` stored under that name; an empty memory if there is none."""
    return Memory(state.get(f"{name}.factor"), state.get(f"{name}.base"))


def with_memory(state: TensorState, name: str, memory: Memory) -> TensorState:
    """The state with that memory under that name.

    All other tensors move to the memory's device, because a checkpoint restores them on the CPU.
    """
    tensors = {f"{name}.factor": memory.factor_JR, f"{name}.base": memory.base_JJ}
    stored = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    device = next(iter(stored.values())).device
    return {key: tensor.to(device) for key, tensor in state.items() if key not in tensors} | stored
