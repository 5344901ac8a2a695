"""Recursive least squares: a ridge regression that remembers every key it has seen, in memory that does not grow with their number.

With the keys so far K_1 ... K_t and a prior A_0, the memory is A_t = A_0 + sum_s K_s K_s^T. If each residual R_t is measured on the
current matrix, W_0 + D_{t-1}, then the ridge solution over all edits at once moves by

    D_t - D_{t-1} = R_t K_t^T A_t^-1 = R_t (I + K_t^T A_{t-1}^-1 K_t)^-1 K_t^T A_{t-1}^-1

since D_t A_t = sum_s (R_s + D_{s-1} K_s) K_s^T = D_{t-1} A_{t-1} + D_{t-1} K_t K_t^T + R_t K_t^T = D_{t-1} A_t + R_t K_t^T. Only A_t^-1 K
is ever needed; the sum of R K^T need not be kept.

A_t^-1 = A_0^-1 - F F^T by Woodbury (Golub & Van Loan, Matrix Computations, 4th ed., 2.1.4). The factor F gains a column a key; once it is
so wide that a full matrix is as cheap to use, A_t^-1 itself is kept, for good. Either way a solve costs O(I^2) a key and never I^3, but
for the one change of form. All in float64.

Shape letters: O d_out, I d_in, N keys of a batch, R columns of the factor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank

if TYPE_CHECKING:
    from editkit.types import TensorState

WIDEST_FACTOR = 0.25  # of I; the factor is then read twice a key, and so costs half of what the full matrix does

Prior = Callable[["torch.Tensor"], "torch.Tensor"]  # keys (I, N) float64 -> A_0^-1 @ keys


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """(A_0 + sum K K^T)^-1 for all keys seen, given A_0^-1. A value: `plus` gives a new one."""

    factor_IR: torch.Tensor | None = None  # A_0^-1 - F F^T; None before the first key
    inverse_II: torch.Tensor | None = None  # or the whole of it; then there is no factor

    def inverse_times(self, keys_IN: torch.Tensor, prior: Prior) -> torch.Tensor:
        """(A_0 + sum K K^T)^-1 @ keys, float64."""
        keys_IN = keys_IN.double()
        if self.inverse_II is not None:
            return self.inverse_II.to(keys_IN.device) @ keys_IN
        image_IN = prior(keys_IN)
        if self.factor_IR is None:
            return image_IN
        factor_IR = self.factor_IR.to(keys_IN.device)
        return image_IN - factor_IR @ (factor_IR.T @ keys_IN)

    def plus(self, keys_IN: torch.Tensor, prior: Prior) -> Memory:
        """The memory with more keys in it."""
        keys_IN = keys_IN.double()
        size = keys_IN.shape[0]
        _, columns_IN = self._woodbury(keys_IN, prior)
        if self.inverse_II is not None:
            return Memory(inverse_II=torch.addmm(self.inverse_II.to(columns_IN.device), columns_IN, columns_IN.T, alpha=-1))
        factor_IR = columns_IN if self.factor_IR is None else torch.cat([self.factor_IR.to(columns_IN.device), columns_IN], dim=1)
        if factor_IR.shape[1] <= WIDEST_FACTOR * size:
            return Memory(factor_IR=factor_IR)
        start_II = prior(torch.eye(size, dtype=torch.float64, device=keys_IN.device))
        return Memory(inverse_II=torch.addmm((start_II + start_II.T) / 2, factor_IR, factor_IR.T, alpha=-1))

    def solve(self, keys_IN: torch.Tensor, residuals_ON: torch.Tensor, prior: Prior) -> LowRank:
        """R K^T (A + K K^T)^-1 with A the memory before these keys; float64, rank N."""
        lower_NN, columns_IN = self._woodbury(keys_IN.double(), prior)
        return LowRank(torch.linalg.solve_triangular(lower_NN, residuals_ON.double().T, upper=False).T, columns_IN)

    def _woodbury(self, keys_IN: torch.Tensor, prior: Prior) -> tuple[torch.Tensor, torch.Tensor]:
        """L with L L^T = I + K^T A^-1 K, and A^-1 K L^-T: both sides of every product here get half of the N x N system's inverse.

        The whole of it on one side would be as right in float64, but columns that nearly cancel lose their digits in float32 factors.
        """
        image_IN = self.inverse_times(keys_IN, prior)
        gram_NN = keys_IN.T @ image_IN
        core_NN = (gram_NN + gram_NN.T) / 2 + torch.eye(keys_IN.shape[1], dtype=gram_NN.dtype, device=gram_NN.device)
        lower_NN, failed = torch.linalg.cholesky_ex(core_NN)
        # It fails where a key is not finite, as a collapsed model's are: that is a result, not an error.
        lower_NN = torch.where(failed > 0, torch.nan, lower_NN)
        return lower_NN, torch.linalg.solve_triangular(lower_NN, image_IN.T, upper=False).T


def memory_of(state: TensorState, name: str) -> Memory:
    """The memory that `with_memory` put under that name; an empty one where there is none."""
    return Memory(state.get(f"{name}.factor"), state.get(f"{name}.inverse"))


def with_memory(state: TensorState, name: str, memory: Memory) -> TensorState:
    """The state with that memory under that name. The rest of it follows to the memory's device: a checkpoint's tensors lie on the CPU."""
    tensors = {f"{name}.factor": memory.factor_IR, f"{name}.inverse": memory.inverse_II}
    found = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    device = next(iter(found.values())).device
    return {key: tensor.to(device) for key, tensor in state.items() if key not in tensors} | found
