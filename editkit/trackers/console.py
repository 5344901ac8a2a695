"""What a person sees of a run: progress, warnings, and the final table.

A line at every milestone, and on a terminal a progress bar below. rich is imported when it is
needed: naming this tracker costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from editkit.errors import ConfigError
from editkit.records.tracker import AbstractTracker, RunInfo, Status
from editkit.trackers.display import Display, say_warning
from editkit.trackers.watch import Watch
from editkit.types import EvalRecord, StepRecord


@dataclass(frozen=True, kw_only=True)
class Console(AbstractTracker):
    """Shows a run on stdout. The thresholds say when a person is warned, see `Watch`."""

    condition_ratio: float = 100.0  # times the condition number of the unedited matrix
    loss_ratio: float = 10.0  # times the running median of the loss
    loss_window: int = 50  # how many losses that median runs over
    # The run that is on display, or none: the options are frozen, what they open is not.
    _open: list[Display] = field(init=False, repr=False, compare=False, default_factory=list)

    def __post_init__(self) -> None:
        given = {
            "condition_ratio": self.condition_ratio,
            "loss_ratio": self.loss_ratio,
            "loss_window": self.loss_window,
        }
        if wrong := [
            f"tracker.{name}: {value} was given; a number of at least 1 is needed."
            for name, value in given.items()
            if not value >= 1
        ]:
            raise ConfigError(wrong)

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
