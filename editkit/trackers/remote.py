"""Trackers that send a run somewhere, in addition to the run's files.

A failure there is reported once, and the run continues. Each such tracker forwards every call to
the next one, `beside`, so that several of them stand in a row and the console comes last.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from editkit.records.tracker import AbstractTracker, RunInfo, Status
from editkit.report.labels import labels
from editkit.trackers.guarded import attempt
from editkit.trackers.history import History
from editkit.types import EvalRecord, SampleRecord, StepRecord


def cell_id(folder: Path) -> str:
    """The id of a cell in a tracker. It is made of experiment, name with the configuration's hash,
    and seed; the outputs' folder has no part in it.
    """
    return hashlib.sha256(cell_name(folder).encode()).hexdigest()[:16]


def cell_name(folder: Path) -> str:
    """Experiment, name with the configuration's hash, and seed of a cell."""
    return "/".join(folder.absolute().parts[-3:])


def label_values(config: Mapping[str, Any]) -> dict[str, str]:
    """Model, editor, restraint, dataset, suite and seed of a run, by which runs are compared."""
    return labels(config) | {"seed": str(config.get("seed", ""))}


class AbstractDestination(abc.ABC):
    """One open run in a tracker. Every method may raise that tracker's errors."""

    @abc.abstractmethod
    def log(self, row: Mapping[str, Any], *, step: int) -> None:
        """Adds values to the row of a step."""

    def samples(self, record: SampleRecord) -> None:  # noqa: B027 (an optional hook)
        """Adds the samples of an evaluator."""

    @abc.abstractmethod
    def conclude(self, *, failed: bool) -> None:
        """The run ended. Everything that was logged has arrived when this returns."""


@dataclass(frozen=True, kw_only=True)
class AbstractRemote(AbstractTracker):
    """Sends a run's numbers to one destination, and forwards every call to a second tracker.

    A concrete tracker has a `title` for messages and says how to `connect`.
    """

    title: ClassVar[str]

    beside: AbstractTracker
    # The open destination, if any. The options are frozen; this list is not.
    _open: list[tuple[AbstractDestination, History]] = field(
        init=False, repr=False, compare=False, default_factory=list
    )

    @abc.abstractmethod
    def connect(self, run: RunInfo) -> AbstractDestination | None:
        """The destination of this run, open. None: this run is not sent."""

    def open(self, run: RunInfo) -> None:
        # First, since its output would break the console's progress bar.
        self._attempt(lambda: self._begin(run))
        self.beside.open(run)

    def step(self, record: StepRecord) -> None:
        self.beside.step(record)
        self._send(lambda sent, history: sent.log(history.step(record), step=record.step))

    def evaluation(self, record: EvalRecord) -> None:
        self.beside.evaluation(record)
        self._send(lambda sent, history: sent.log(history.evaluation(record), step=record.step))

    def samples(self, record: SampleRecord) -> None:
        self.beside.samples(record)
        self._send(lambda sent, _: sent.samples(record))

    def warning(self, text: str) -> None:
        self.beside.warning(text)

    def close(self, status: Status) -> None:
        self.beside.close(status)
        self._send(lambda sent, _: sent.conclude(failed=status in ("failed", "collapsed")))
        self._open.clear()

    def _begin(self, run: RunInfo) -> None:
        if (sent := self.connect(run)) is not None:
            edits = min(run.resumed_at * run.batch_size, run.edits)
            self._open.append((sent, History(trajectory=run.views[0], edits=edits)))

    def _send(self, action: Callable[[AbstractDestination, History], object]) -> None:
        if self._open and not self._attempt(lambda: action(*self._open[0])):
            self._open.clear()

    def _attempt(self, action: Callable[[], object]) -> bool:
        return attempt(self.title, action, self.beside.warning)
