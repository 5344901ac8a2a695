"""What a run is made of: the values that the runner reads, except how far it has come."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from editkit.config.experiment import LedgerOptions
from editkit.config.schedule import Schedule
from editkit.datasets.base import LoadedDataset
from editkit.editors.base import AbstractAnyEditor
from editkit.evaluation.base import AbstractEvaluator
from editkit.resources.peak_memory import Peaks
from editkit.restraints.base import Restraints
from editkit.types import EditRequest, StepRecord

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments

DIGITS = 12


class Collapse(Exception):
    """A number went bad and the run was told to stop there."""

    def __init__(self, record: StepRecord) -> None:
        super().__init__(
            f"non-finite {record.nonfinite} at step {record.step} (requests "
            f"{', '.join(record.requests)})"
        )
        self.record = record


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """Everything that a run is made of, except how far it has come."""

    model: EditableModel
    editor: AbstractAnyEditor[Any]
    restraints: Restraints
    requests: tuple[EditRequest, ...]
    evaluators: Mapping[str, AbstractEvaluator]
    schedule: Schedule
    moments: Moments
    seed: int
    on_collapse: Literal["stop", "continue"] = "stop"
    timings: tuple[str, ...] = ("milestone",)  # also "immediate" and "final"
    rollback: bool = False  # every batch on the unedited model
    # measured at a milestone; None: all edits so far, as with rollback, where each is measured once
    max_requests: int | None = None
    block_size: int | None = None  # of the blocks of edits that evaluations tell apart
    dataset: str | None = None  # its digest
    # where the requests come from, if they were selected after the model was loaded
    data: LoadedDataset | None = None
    # requests of the dataset that the run does not edit
    pool: tuple[EditRequest, ...] = ()
    # that a new run begins with; None: the editor is asked when it begins
    contexts: tuple[str, ...] | None = None
    # digests of what is read besides the configuration (`editkit.runner.inputs`)
    inputs: Mapping[str, str] = field(default_factory=dict)
    peaks: Peaks = field(default_factory=Peaks)  # the memory of each phase
    ledger: LedgerOptions = field(default_factory=LedgerOptions)
    # asked at every step's end: save and leave?
    should_stop: Callable[[], bool] = field(default=lambda: False)

    @property
    def notes_every_step(self) -> bool:
        """Whether each batch is measured right after it was edited in: with rollback, nothing else
        would ever measure it.
        """
        return self.rollback or "immediate" in self.timings

    def batch(self, step: int) -> tuple[EditRequest, ...]:
        """The requests of a step, counted from 1."""
        size = self.schedule.batch_size
        return self.requests[(step - 1) * size : step * size]

    def positions(self, step: int) -> tuple[int, ...]:
        """Of a step's batch among the run's edits, counted from 1."""
        first = (step - 1) * self.schedule.batch_size + 1
        return tuple(range(first, first + len(self.batch(step))))

    def at(self, positions: Iterable[int]) -> tuple[EditRequest, ...]:
        """The requests at positions among the run's edits, counted from 1."""
        return tuple(self.requests[position - 1] for position in positions)

    def measured(self, step: int) -> tuple[int, ...]:
        """The positions of the edits that are measured at a step: all so far, at step 0 those to
        come; or the seeded sample of them.

        Whether an edit is in the sample depends on its id and on how many others there are: from
        one milestone to the next most stay.
        """
        so_far = range(1, (self.schedule.edits_at(step) or len(self.requests)) + 1)
        if self.max_requests is None or self.rollback or len(so_far) <= self.max_requests:
            return tuple(so_far)

        def lot(position: int) -> bytes:
            return hashlib.sha256(f"{self.seed}/{self.requests[position - 1].id}".encode()).digest()

        return tuple(sorted(sorted(so_far, key=lot)[: self.max_requests]))

    def evaluated(self) -> dict[str, dict[str, Any]]:
        """By the digest that evaluations carry, which of the run's edits it stands for: their
        positions, or all up to a number.
        """
        found: dict[str, dict[str, Any]] = {}
        for step in range(self.schedule.last_step + 1):
            for positions in self._told_apart(step):
                is_all = positions == tuple(range(1, len(positions) + 1))
                found[digest_of(self.at(positions))] = (
                    {"first": len(positions)} if is_all else {"positions": list(positions)}
                )
        return found

    def _told_apart(self, step: int) -> Iterator[tuple[int, ...]]:
        """The positions of all edits that a step's evaluations are about, and of the parts of them
        that have a digest of their own.
        """
        if self.rollback and step:
            yield self.positions(step)
        if self.schedule.is_measured(step):
            yield (measured := self.measured(step))
            if (size := self.block_size) is not None:
                yield from (
                    tuple(block)
                    for _, block in itertools.groupby(
                        measured, lambda position: (position - 1) // size
                    )
                )

    def ever_measured(self) -> tuple[EditRequest, ...]:
        """The requests whose answers the unedited model must give."""
        if self.notes_every_step or self.max_requests is None:
            return self.requests
        steps = (
            step for step in range(self.schedule.last_step + 1) if self.schedule.is_measured(step)
        )
        chosen = {position for step in steps for position in self.measured(step)}
        return self.at(sorted(chosen))


def label(positions: Sequence[int]) -> str:
    """What a block of consecutive edits is called: "3-4"."""
    return f"{positions[0]}-{positions[-1]}"


def digest_of(requests: Sequence[EditRequest]) -> str:
    """Twelve hexadecimal digits that stand for the requests' ids in evaluations; the list is in
    provenance.json.
    """
    return hashlib.sha256("\n".join(request.id for request in requests).encode()).hexdigest()[
        :DIGITS
    ]
