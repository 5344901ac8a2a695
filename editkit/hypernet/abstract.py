"""What all hypernetworks have in common: tensors by name, of which some learn, for some matrices.

Matrices of one shape share a network. The names of its tensors begin with the shape: "512x128.u1"
for O = 512, I = 128.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from editkit.linalg.running import NAMES

if TYPE_CHECKING:
    from editkit.lazy import torch

STATISTICS = NAMES  # running statistics of a shape; all other tensors learn
STEP_SIZES = "step_sizes"  # one for each matrix

Shape = tuple[int, int]  # (O, I)


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """The inputs of a matrix and the gradients of its outputs, by token; zeros for tokens that do
    not count.
    """

    inputs_NI: torch.Tensor
    gradients_NO: torch.Tensor

    @property
    def counts_N(self) -> torch.Tensor:
        """Whether a token counts: neither its input nor its gradient is zero."""
        return (self.inputs_NI != 0).any(dim=-1) & (self.gradients_NO != 0).any(dim=-1)


@dataclass(frozen=True, eq=False)
class AbstractNetwork(abc.ABC):
    """Weights and running statistics for a set of matrices. Immutable: its methods return new ones.
    Only an optimiser that owns the tensors changes them.
    """

    shapes: Mapping[str, Shape]  # by module, in the order in which they are edited
    options: Any  # the sizes of the network, a dataclass
    tensors: Mapping[str, torch.Tensor]

    @abc.abstractmethod
    def observed(self, factors: Mapping[str, Factors]) -> Self:
        """The network with the statistics of further tokens, matrix by matrix."""

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def modules_of(self, shape: Shape) -> tuple[str, ...]:
        """The matrices of that shape, which share one network."""
        return tuple(module for module, own in self.shapes.items() if tuple(own) == tuple(shape))

    def learned(self) -> dict[str, torch.Tensor]:
        """The tensors that Adam updates."""
        return {
            name: tensor
            for name, tensor in self.tensors.items()
            if name.rpartition(".")[2] not in STATISTICS
        }

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The same network with some tensors replaced."""
        return replace(self, tensors={**self.tensors, **tensors})

    def to(self, device: torch.device | str) -> Self:
        """The same network on another device."""
        return replace(
            self, tensors={name: tensor.to(device) for name, tensor in self.tensors.items()}
        )

    def detached(self) -> Self:
        """A detached copy."""
        return replace(
            self, tensors={name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        )


def name_of(shape: Sequence[int]) -> str:
    """The prefix of the tensor names of a shape's network."""
    return f"{shape[0]}x{shape[1]}"
