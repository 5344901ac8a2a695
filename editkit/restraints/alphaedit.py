"""AlphaEdit: updates in the null space of the keys of common text, which also spare the keys of
earlier edits.

Fang et al. 2024, "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models" (arXiv
2410.02355), the closed form of section 3.3. U_0 are the eigenvectors of C = E[k k^T] whose
eigenvalues lie below a threshold, P = U_0 U_0^T, and G = sum of K K^T over earlier edits. Then

    D = R K^T P ((G + K K^T) P + l2 I)^-1 = R (I + K^T A^-1 K)^-1 K^T A^-1
    A^-1 = P (P G P + l2 I)^-1 P

The right-hand side needs no I x I system. A^-1 begins as P / l2 and is updated by each batch of
keys, as in `editkit.linalg.recursive`. It is stored in the coordinates of the null space if that
has the smaller basis.

The authors' code measures the keys of G again after each batch. They are the keys of the solve: the
input of a matrix depends on the matrices below it alone, and MEMIT writes from below and measures
each layer's keys after the layers under it were written. So no key is measured twice here. The
editor's weight on C is not used.

Differs from the authors' code: float64 by default (they solve a non-symmetric system in float32);
the eigenvectors belong to the second moments of this model; the history belongs to the run.

Memory: at most I x I / 2 x 8 bytes a matrix for the basis, and the history as for D4S, with R
instead of I if the null space has the smaller basis. `solve.dtype=float32` halves both. Before the
first edit there is one eigendecomposition a matrix, in float64.

Shape letters: I d_in, N edits of a batch, R dimensions of the smaller of null space and complement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from editkit.errors import OptionError, message
from editkit.lazy import torch
from editkit.linalg.recursive import Prior, memory_numbers, memory_of, times, with_memory
from editkit.resources.workload import SolveMemory, Workload
from editkit.restraints.base import AbstractSolveRestraint
from editkit.stats.least_squares import LeastSquares

if TYPE_CHECKING:
    from editkit.linalg.lowrank import LowRank
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments
    from editkit.types import TensorState


@dataclass(frozen=True, kw_only=True)
class AlphaEdit(AbstractSolveRestraint):
    """The null-space projection in the least squares.

    Raises:
        OptionError: an option is out of range.
    """

    threshold: float  # eigenvalues of C below it span the null space
    threshold_unit: Literal[
        "absolute", "relative"
    ]  # relative: times the mean eigenvalue, which follows the activations' scale
    l2: float  # weight of |D|_F^2

    def __post_init__(self) -> None:
        problems = [
            message(name, "must be positive", got=getattr(self, name))
            for name in ("threshold", "l2")
            if not getattr(self, name) > 0
        ]
        if problems:
            raise OptionError(problems)

    def memory(self, work: Workload) -> SolveMemory:
        """The history, and at most half a matrix for the null space. Its eigendecomposition works
        in float64.
        """
        size = work.architecture.inner
        numbers, _ = memory_numbers(size, work.edits)
        kept = work.num_matrices * (numbers + size * size / 2) * work.solve_bytes
        return SolveMemory(kept=kept, working=float(3 * size * size * 8))

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """The null space of each matrix's keys, as a basis of it or of its complement.

        Raises:
            OptionError: no eigenvalue of a second moment lies below the threshold.
        """
        state: dict[str, torch.Tensor] = {}
        for module in moments.by_module:
            state |= self._null_space(module, moments)
        return state

    def solve(self, problem: LeastSquares, state: TensorState, moments: Moments) -> LowRank:
        """The update in the residuals' dtype. `problem.weight` is not used."""
        memory = memory_of(state, problem.module)
        return memory.solve(problem.keys_IN, problem.residuals_ON, self._prior(problem, state)).to(
            dtype=problem.residuals_ON.dtype
        )

    def observe(self, problem: LeastSquares, state: TensorState, moments: Moments) -> TensorState:
        """Adds the solved problem's keys to the history."""
        memory = memory_of(state, problem.module).plus(
            problem.keys_IN, self._prior(problem, state), dtype=moments.dtype
        )
        return with_memory(state, problem.module, memory)

    def _null_space(self, module: str, moments: Moments) -> TensorState:
        values_I, vectors_II = torch.linalg.eigh(moments.second_moment(module))  # ascending
        limit = self.threshold * (
            float(values_I.mean()) if self.threshold_unit == "relative" else 1.0
        )
        size, inside = len(values_I), int((values_I < limit).sum())
        if inside == 0:
            smallest, largest = float(values_I[0]), float(values_I[-1])
            raise OptionError(
                message(
                    "threshold",
                    f"no eigenvalue of the second moment of {module} lies below {limit:.3g}",
                    got=self.threshold,
                    expected=f"above the smallest of {smallest:.3g} to {largest:.3g}",
                    fix="raise it, or set threshold_unit=relative",
                )
            )
        if 2 * inside <= size:
            name, basis_IR = "null_space", vectors_II[:, :inside]
        else:
            name, basis_IR = "complement", vectors_II[:, inside:]
        return {
            f"{module}.{name}": basis_IR.to(
                getattr(torch, moments.dtype), memory_format=torch.contiguous_format, copy=True
            )
        }

    def _prior(self, problem: LeastSquares, state: TensorState) -> Prior:
        """P / l2: T is U_0^T / sqrt(l2) by the basis, or P / sqrt(l2) by the complement's."""
        root = math.sqrt(self.l2)
        if (basis_IR := state.get(f"{problem.module}.null_space")) is not None:
            return Prior(
                whiten=lambda keys_IN: times(basis_IR.T.to(keys_IN.device), keys_IN) / root,
                unwhiten=lambda white_RN: times(basis_IR.to(white_RN.device), white_RN) / root,
            )
        complement_IR = state[f"{problem.module}.complement"]

        def project(keys_IN: torch.Tensor) -> torch.Tensor:
            on_device_IR = complement_IR.to(keys_IN.device)
            return (keys_IN - times(on_device_IR, times(on_device_IR.T, keys_IN))) / root

        return Prior(whiten=project, unwhiten=project)
