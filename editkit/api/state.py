"""The state of a session between two edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.linalg.spectral import Spectrum
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.model.history import Mark
    from editkit.model.side_value import AbstractBeside


@dataclass(frozen=True, kw_only=True)
class SessionState:
    """Everything besides the weights that the next edit depends on."""

    mark: Mark | None  # of the edit that led here; None: no edit of the session yet
    editor: TensorState
    solve: TensorState
    spectra: Mapping[str, Spectrum]
    generators: TensorState
    sides: tuple[AbstractBeside, ...] = ()  # that the session put beside the weights
    requests: tuple[EditRequest, ...] = ()  # of that edit
    kept: int | None = None  # its id in the ledger
