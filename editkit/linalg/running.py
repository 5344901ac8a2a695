"""Running statistics of vectors, exact however they are divided into batches.

The mean and the sums of squares of two batches give those of both (Chan, Golub & LeVeque 1979,
"Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"):

    mean = mean_1 + shift n_2 / n                          shift = mean_2 - mean_1, n = n_1 + n_2
    S    = S_1 + S_2 + shift shift^T n_1 n_2 / n           S = sum of (z - mean) (z - mean)^T

The variance is S / (n - 1). A batch of one vector has S_2 = 0.

Shape letters: N vectors, Z their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from editkit.lazy import torch

NAMES = ("mean", "squares", "count")


@dataclass(frozen=True, slots=True, eq=False)
class Running:
    """Count, mean and sums of squares of the vectors so far, in float64. Immutable."""

    mean_Z: torch.Tensor
    squares_Z: torch.Tensor  # the diagonal of S
    count: torch.Tensor
    scatter_ZZ: torch.Tensor | None = None  # S; None: only its diagonal is kept

    @classmethod
    def empty(cls, size: int, *, is_full: bool = False) -> Running:
        """Without any vector. With `is_full`, covariances are kept as well."""
        zeros_Z = torch.zeros(size, dtype=torch.float64)
        return cls(
            mean_Z=zeros_Z,
            squares_Z=zeros_Z.clone(),
            count=torch.zeros((), dtype=torch.float64),
            scatter_ZZ=torch.zeros(size, size, dtype=torch.float64) if is_full else None,
        )

    def plus(self, z_NZ: torch.Tensor) -> Running:
        """The statistics with further vectors."""
        if not len(z_NZ):
            return self
        z_NZ = z_NZ.double()
        new_Z = z_NZ.mean(dim=0)
        total = self.count + len(z_NZ)
        shift_Z = new_Z - self.mean_Z
        share = self.count * len(z_NZ) / total
        centred_NZ = z_NZ - new_Z
        scatter_ZZ = self.scatter_ZZ
        if scatter_ZZ is not None:
            outer_ZZ = torch.outer(shift_Z, shift_Z)
            scatter_ZZ = scatter_ZZ + centred_NZ.T @ centred_NZ + outer_ZZ * share
        return replace(
            self,
            mean_Z=self.mean_Z + shift_Z * (len(z_NZ) / total),
            squares_Z=self.squares_Z + centred_NZ.square().sum(dim=0) + shift_Z.square() * share,
            count=total,
            scatter_ZZ=scatter_ZZ,
        )

    def deviation(self) -> torch.Tensor:
        """(Z,), the unbiased standard deviations. Not a number with fewer than two vectors."""
        return (self.squares_Z / (self.count - 1)).sqrt()

    def to(self, device: torch.device | str) -> Running:
        """The same statistics on another device."""
        scatter_ZZ = None if self.scatter_ZZ is None else self.scatter_ZZ.to(device)
        return Running(
            self.mean_Z.to(device), self.squares_Z.to(device), self.count.to(device), scatter_ZZ
        )

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors for a checkpoint, by `name` and a suffix."""
        tensors = dict(zip(NAMES, (self.mean_Z, self.squares_Z, self.count), strict=True))
        if self.scatter_ZZ is not None:
            tensors["scatter"] = self.scatter_ZZ
        return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}

    @classmethod
    def from_state(cls, name: str, state: Mapping[str, torch.Tensor]) -> Running:
        """The inverse of `state`."""
        mean_Z, squares_Z, count = (state[f"{name}.{suffix}"] for suffix in NAMES)
        return cls(mean_Z, squares_Z, count, state.get(f"{name}.scatter"))
