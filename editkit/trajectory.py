"""What a run is made of: the values that the runner reads, except how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from editkit.editors.base import AbstractEditor
from editkit.evaluation.base import AbstractEvaluator
from editkit.restraints.base import Restraints
from editkit.schedule import Schedule
from editkit.types import EditRequest, StepRecord

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments


class Collapse(Exception):
    """A number went bad and the run was told to stop there."""

    def __init__(self, record: StepRecord) -> None:
        super().__init__(f"non-finite {record.nonfinite} at step {record.step} (requests {', '.join(record.requests)})")
        self.record = record


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Everything that a run is made of, except how far it has come."""

    model: EditableModel
    editor: AbstractEditor
    restraints: Restraints
    requests: tuple[EditRequest, ...]
    evaluators: Mapping[str, AbstractEvaluator]
    schedule: Schedule
    moments: Moments
    seed: int
    on_collapse: Literal["stop", "continue"] = "stop"
    should_stop: Callable[[], bool] = field(default=lambda: False)  # asked at every step's end: save and leave?

    def batch(self, step: int) -> tuple[EditRequest, ...]:
        """The requests of a step, counted from 1."""
        size = self.schedule.batch_size
        return self.requests[(step - 1) * size : step * size]
