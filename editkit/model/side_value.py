"""What everything beside the weights has in common: it is a value with tensors and settings."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from editkit.types import TensorState

if TYPE_CHECKING:
    from editkit.lazy import torch


class AbstractBeside(abc.ABC):
    """A value that stands beside the weights: a frozen dataclass of one of three kinds,
    `editkit.model.beside.AbstractSide`, `editkit.model.texts.AbstractTexts` and
    `editkit.model.stand_in.AbstractStandIn`.
    """

    @property
    @abc.abstractmethod
    def place(self) -> str:
        """Where it stands, for messages."""

    @abc.abstractmethod
    def options(self) -> dict[str, Any]:
        """Its settings as plain JSON values."""

    @abc.abstractmethod
    def state(self) -> TensorState:
        """Its tensors by name."""

    @classmethod
    @abc.abstractmethod
    def restored(cls, options: Mapping[str, Any], state: TensorState) -> Self:
        """The inverse of `options` and `state`."""

    @abc.abstractmethod
    def figures(self) -> dict[str, float]:
        """Telemetry: `entries` or `ranks`, and `parameters`, `bytes`, `norm`."""

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.state().items()}
        return self.restored(self.options(), moved)
