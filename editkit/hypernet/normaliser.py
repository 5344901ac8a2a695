"""Normalised features: inputs and gradients of tokens by the statistics of all tokens so far.

    diagonal    z^ = (z - mean) / (std + rounding)
    full        z^ = (z - mean) Sigma^-1/2, Sigma = S / (n - Z - 1) once n > Z + 1 (StableEdit),
                with eigenvalues of at least `SMALLEST`; until then the diagonal

With fewer than two tokens there is no deviation, and z^ = z.

Shape letters: N tokens, Z the size of a feature, O d_out, I d_in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.hypernet.abstract import Factors, Shape
from editkit.lazy import torch
from editkit.linalg.running import Running

if TYPE_CHECKING:
    from editkit.types import TensorState

# float32's rounding, added to standard deviations as in MALMEN's and UltraEdit's code
ROUNDING = 1.1920929e-07
SMALLEST = 1e-6  # eigenvalue of Sigma, as in StableEdit's code

# Features (N, Z) -> normalised ones, float64
Normal = Callable[["torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, slots=True, eq=False)
class Normaliser:
    """The statistics of the matrices of one shape. Immutable."""

    inputs: Running
    gradients: Running

    @classmethod
    def empty(cls, shape: Shape, *, whitens: bool) -> Normaliser:
        """Without any token. With `whitens`, gradients are whitened in full."""
        rows, columns = shape
        return cls(Running.empty(columns), Running.empty(rows, is_full=whitens))

    def plus(self, features: Factors) -> Normaliser:
        """The statistics with further tokens, on the tokens' device."""
        device = features.inputs_NI.device
        return Normaliser(
            self.inputs.to(device).plus(features.inputs_NI),
            self.gradients.to(device).plus(features.gradients_NO),
        )

    def maps(self) -> tuple[Normal, Normal]:
        """The normalisation of inputs and that of gradients."""
        return _normal(self.inputs), _normal(self.gradients)

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors for a checkpoint."""
        return self.inputs.state(f"{name}.inputs") | self.gradients.state(f"{name}.gradients")

    @classmethod
    def from_state(cls, name: str, state: TensorState) -> Normaliser:
        """The inverse of `state`."""
        return cls(
            Running.from_state(f"{name}.inputs", state),
            Running.from_state(f"{name}.gradients", state),
        )


def _normal(running: Running) -> Normal:
    count = float(running.count)
    if count < 2:
        return lambda z_NZ: z_NZ.double()
    mean_Z = running.mean_Z
    spare = count - len(mean_Z) - 1
    if running.scatter_ZZ is None or spare <= 0:
        scale_Z = running.deviation() + ROUNDING
        return lambda z_NZ: (z_NZ.double() - mean_Z) / scale_Z
    values_Z, vectors_ZZ = torch.linalg.eigh(running.scatter_ZZ / spare)
    root_ZZ = (vectors_ZZ * values_Z.clamp_min(SMALLEST).rsqrt()) @ vectors_ZZ.T
    return lambda z_NZ: (z_NZ.double() - mean_Z) @ root_ZZ
