"""A tracker that fails is switched off, and the run continues: an observer must not cost a run."""

from __future__ import annotations

import logging
from collections.abc import Callable

from editkit.records.tracker import AbstractTracker, RunInfo, Status
from editkit.types import EvalRecord, SampleRecord, StepRecord

log = logging.getLogger(__name__)


def attempt(what: str, action: Callable[[], object], warn: Callable[[str], object]) -> bool:
    """Whether the action succeeded. A failure is reported in one sentence."""
    try:
        action()
    except Exception as error:
        reason = " ".join(str(error).split())
        warn(
            f"{what} failed and is switched off; the run and its files are not affected "
            f"({type(error).__name__}: {reason})"
        )
        return False
    return True


class Guarded(AbstractTracker):
    """Forwards every call to one tracker until that fails. Only a person's interrupt passes
    through.
    """

    def __init__(self, tracker: AbstractTracker) -> None:
        self._tracker = tracker
        self._works = True

    def open(self, run: RunInfo) -> None:
        self._forward(lambda: self._tracker.open(run))

    def step(self, record: StepRecord) -> None:
        self._forward(lambda: self._tracker.step(record))

    def evaluation(self, record: EvalRecord) -> None:
        self._forward(lambda: self._tracker.evaluation(record))

    def samples(self, record: SampleRecord) -> None:
        self._forward(lambda: self._tracker.samples(record))

    def warning(self, text: str) -> None:
        if self._works:
            self._forward(lambda: self._tracker.warning(text))
        else:
            log.warning(text)

    def close(self, status: Status) -> None:
        self._forward(lambda: self._tracker.close(status))

    def _forward(self, call: Callable[[], object]) -> None:
        if self._works:
            self._works = attempt(f"the tracker {type(self._tracker).__name__}", call, log.warning)
