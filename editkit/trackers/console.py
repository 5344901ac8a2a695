"""A run on the console: progress, warnings and the final table.

There is a line for each milestone and, on a terminal, a progress bar. rich is imported when a run
is opened, so that choosing this tracker costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from editkit.errors import OptionError, message
from editkit.records.tracker import AbstractTracker, RunInfo, Status
from editkit.trackers.display import Display, say_warning
from editkit.trackers.watch import Watch
from editkit.types import EvalRecord, StepRecord


@dataclass(frozen=True, kw_only=True)
class Console(AbstractTracker):
    """Shows a run on stdout. `Watch` explains the thresholds of its warnings.

    Raises:
        OptionError: a threshold is out of range.
    """

    condition_ratio: float = 100.0  # times the condition number of the unedited matrix
    loss_ratio: float = 10.0  # times the running median of the loss
    loss_window: int = 50  # number of losses in that median
    # The run on display, if any. The options are frozen; this list is not.
    _open: list[Display] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        given = {
            "condition_ratio": self.condition_ratio,
            "loss_ratio": self.loss_ratio,
            "loss_window": self.loss_window,
        }
        if wrong := [
            message(name, "out of range", got=value, expected="at least 1")
            for name, value in given.items()
            if not value >= 1
        ]:
            raise OptionError(wrong)

    def open(self, run: RunInfo) -> None:
        assert not self._open, "a tracker watches one run at a time"
        watch = Watch(
            condition_ratio=self.condition_ratio,
            loss_ratio=self.loss_ratio,
            loss_window=self.loss_window,
        )
        self._open.append(Display(run, watch))

    def step(self, record: StepRecord) -> None:
        self._open[0].step(record)

    def evaluation(self, record: EvalRecord) -> None:
        self._open[0].evaluation(record)

    def warning(self, text: str) -> None:
        if self._open:
            self._open[0].warn(text)
        else:
            say_warning(text)

    def close(self, status: Status) -> None:
        if self._open:
            self._open.pop().close(status)
