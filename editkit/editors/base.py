"""The editor's interface: from requests to updates, reading the model and never writing it.

The runner owns the order (DESIGN section 1): `contexts` and `init` once a run; `plan` once a batch;
`propose` once a module, each module seeing the updates of those before it; `observe` when the batch
is applied.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from editkit.restraints.base import Place
from editkit.stats.least_squares import LeastSquares
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.datasets.base import LoadedDataset
    from editkit.lazy import torch
    from editkit.linalg.lowrank import Update
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments
    from editkit.targets.objective import Objective

Solve = Callable[[LeastSquares], "Update"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What an editor found out about a batch before it writes anything; editors extend it by what
    they need in `propose`.
    """

    summary: Mapping[
        str, float
    ]  # goes into StepRecord.target: probability_before, probability_after, steps, loss
    nonfinite: str | None = None


class AbstractEditor(abc.ABC):
    """A method that turns edit requests into updates of weight matrices.

    Concrete editors are frozen dataclasses: their fields are the options.
    """

    places: ClassVar[frozenset[Place]]  # where a restraint may act on this editor
    max_batch_size: ClassVar[int | None] = (
        None  # requests that one batch may hold; None: any number
    )
    spans_devices: ClassVar[bool] = (
        False  # whether it works with model.device_map, a model that lies on several devices
    )

    @property
    @abc.abstractmethod
    def needs_moments(self) -> bool:
        """Whether second moments of keys are needed: known before a model is loaded."""

    def lacks(self) -> list[str]:
        """What a run of this editor cannot do without and does not have; known before a dataset is
        read.
        """
        return []

    def check_requests(self, data: LoadedDataset, requests: Sequence[EditRequest]) -> list[str]:
        """What keeps this editor from making these edits, those of `data` that a run would make:
        known before a model is loaded.
        """
        return []

    def provenance(self) -> Mapping[str, object]:
        """Files besides the model that its edits depend on, as plain values."""
        return {}

    @abc.abstractmethod
    def modules(self, model: EditableModel) -> tuple[str, ...]:
        """Dotted names of the matrices that are edited, in the order in which they are written.

        Raises ConfigError on a layer out of range.
        """

    @abc.abstractmethod
    def moment_modules(self, model: EditableModel) -> tuple[str, ...]:
        """Names of the matrices whose keys' second moments are needed; empty unless
        `needs_moments`.
        """

    @abc.abstractmethod
    def contexts(self, model: EditableModel, generator: torch.Generator) -> tuple[str, ...]:
        """Context templates, each with one "{}" for the prompt; sampled once a run on the unedited
        model and kept in its state.
        """

    @abc.abstractmethod
    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """The state before the first edit."""

    @abc.abstractmethod
    def plan(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        contexts: Sequence[str],
        state: TensorState,
        objective: Objective | None,
    ) -> Plan:
        """Target vectors and whatever else is measured once a batch."""

    @abc.abstractmethod
    def propose(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        module: str,
        plan: Plan,
        state: TensorState,
        moments: Moments,
        solve: Solve,
    ) -> Update:
        """The update of one matrix, (O, I), given the weights as they are now."""

    @abc.abstractmethod
    def observe(
        self, model: EditableModel, requests: Sequence[EditRequest], state: TensorState
    ) -> TensorState:
        """The state after the batch has been applied."""
