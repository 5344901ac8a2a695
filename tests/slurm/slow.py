"""A tracker that makes every edit take at least so long: a tracker changes no result."""

from __future__ import annotations

import time
from dataclasses import dataclass

from editkit.trackers.none import Silent
from editkit.types import StepRecord


@dataclass(frozen=True, kw_only=True)
class Slow(Silent):
    seconds: float

    def step(self, record: StepRecord) -> None:
        time.sleep(self.seconds)
