"""No output: for sweeps, whose results are read from files."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from editkit.records.tracker import AbstractTracker, RunInfo, Status
from editkit.types import EvalRecord, StepRecord

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Silent(AbstractTracker):
    """Shows nothing; warnings go to the log."""

    def open(self, run: RunInfo) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        pass

    def evaluation(self, record: EvalRecord) -> None:
        pass

    def warning(self, text: str) -> None:
        log.warning(text)

    def close(self, status: Status) -> None:
        pass
