"""The interface of trackers, which observe a run.

Trackers never influence a run: they receive values and return nothing, and no record depends on
them. A run writes `steps.jsonl` and `evals.jsonl` with or without a tracker.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from editkit.types import EvalRecord, SampleRecord, StepRecord

# The end of a run: all edits made; stopped by a signal with its state saved; stopped by a number
# that is not finite; stopped by an error.
Status = Literal["done", "interrupted", "collapsed", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """The facts of a run that a tracker receives before the first record."""

    name: str
    folder: Path  # of the run's files
    edits: int  # of the whole run
    batch_size: int  # edits per step; the last step may have fewer
    views: tuple[str, ...]  # the trajectory's own view first, then the restrained ones
    config: Mapping[str, Any]  # resolved, plain values
    unit: str = "edits"  # a training counts steps
    # the last step of earlier sessions; 0: a new run, whose first record is step 0
    resumed_at: int = 0


class AbstractTracker(abc.ABC):
    """Observes one run. Concrete trackers are frozen dataclasses: their fields are the options.

    The order of calls is `open`, the records in the order of the runner (a step's evaluations after
    the step), and `close`, also after an error. A closed tracker may be opened for another run.
    """

    @abc.abstractmethod
    def open(self, run: RunInfo) -> None:
        """A run begins or resumes."""

    @abc.abstractmethod
    def step(self, record: StepRecord) -> None:
        """A batch of edits was applied; step 0 describes the unedited model."""

    @abc.abstractmethod
    def evaluation(self, record: EvalRecord) -> None:
        """A measurement of one view was made."""

    def samples(self, record: SampleRecord) -> None:  # noqa: B027 (an optional hook)
        """The samples of an evaluator. They are in the run's `samples/` in any case."""

    @abc.abstractmethod
    def warning(self, text: str) -> None:
        """A warning for the user, in one line."""

    @abc.abstractmethod
    def close(self, status: Status) -> None:
        """The run ended."""
