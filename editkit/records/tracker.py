"""The tracker's interface: something that watches a run.

Trackers observe and never influence: they are given values, give nothing back, and no record
depends on which trackers are there. What a run writes as its contract (`steps.jsonl`,
`evals.jsonl`) is written whether or not anyone watches.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from editkit.types import EvalRecord, SampleRecord, StepRecord

# How a run ended: all edits made; stopped by a signal with its state saved; stopped by a number
# that is not finite; ended by an error.
Status = Literal["done", "interrupted", "collapsed", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a tracker learns of a run before its first record."""

    name: str
    folder: Path  # where the run's files are
    edits: int  # how many edits the whole run makes
    batch_size: int  # edits a step; the last step may hold fewer
    views: tuple[str, ...]  # the trajectory's own view first, then the restrained ones
    config: Mapping[str, Any]  # resolved, plain values
    unit: str = "edits"  # what is counted: a training counts steps
    # the last step that was done before; 0: a new run, whose first record is step 0
    resumed_at: int = 0


class AbstractTracker(abc.ABC):
    """Watches one run. Concrete trackers are frozen dataclasses: their fields are the options.

    Calls come in this order: `open`; the records in the order in which the runner yields them (a
    step's evaluations after the step); `close`, also after an error. A tracker may be opened again
    for another run after it was closed.
    """

    @abc.abstractmethod
    def open(self, run: RunInfo) -> None:
        """A run begins, or goes on."""

    @abc.abstractmethod
    def step(self, record: StepRecord) -> None:
        """A batch of edits was applied; step 0 describes the unedited model."""

    @abc.abstractmethod
    def evaluation(self, record: EvalRecord) -> None:
        """A measurement of one view was made."""

    def samples(self, record: SampleRecord) -> None:  # noqa: B027 (a hook: who shows no samples need not say so)
        """What an evaluator saw item by item; they are in the run's `samples/` whether or not a
        tracker wants them.
        """

    @abc.abstractmethod
    def warning(self, text: str) -> None:
        """The run has something to say that a person should see; one line."""

    @abc.abstractmethod
    def close(self, status: Status) -> None:
        """The run ended."""
