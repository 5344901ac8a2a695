"""A tracker that fails is left out from then on, and the run goes on: nothing that only watches may
cost a run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from editkit.records.tracker import AbstractTracker, RunInfo, Status
from editkit.types import EvalRecord, SampleRecord, StepRecord

log = logging.getLogger(__name__)


def attempt(what: str, action: Callable[[], object], complain: Callable[[str], object]) -> bool:
    """Whether it went well; if not, it is said in a sentence."""
    try:
        action()
    except Exception as error:
        reason = " ".join(str(error).split())
        complain(
            f"{what} failed and is left out from now on; the run and its files go on ({type(error).__name__}: {reason})"
        )
        return False
    return True


class Guarded(AbstractTracker):
    """Passes everything on to one tracker until that fails. Stops a run only where a person stops
    it.
    """

    def __init__(self, tracker: AbstractTracker) -> None:
        self._tracker = tracker
        self._works = True

    def open(self, run: RunInfo) -> None:
        self._pass_on(lambda: self._tracker.open(run))

    def step(self, record: StepRecord) -> None:
        self._pass_on(lambda: self._tracker.step(record))

    def evaluation(self, record: EvalRecord) -> None:
        self._pass_on(lambda: self._tracker.evaluation(record))

    def samples(self, record: SampleRecord) -> None:
        self._pass_on(lambda: self._tracker.samples(record))

    def warning(self, text: str) -> None:
        if self._works:
            self._pass_on(lambda: self._tracker.warning(text))
        else:
            log.warning(text)

    def close(self, status: Status) -> None:
        self._pass_on(lambda: self._tracker.close(status))

    def _pass_on(self, call: Callable[[], object]) -> None:
        if self._works:
            self._works = attempt(f"the tracker {type(self._tracker).__name__}", call, log.warning)
