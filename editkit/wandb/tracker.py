"""Weights & Biases in addition to the run's files. A failure here is reported once, and the run
continues.

Each cell has one W&B run, also if many cells share a process. Its id is made of the cell's folder,
so that a resumed run continues in it and `editkit push` finds it again. The x axis of all panels is
`edit/step`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from editkit.records.tracker import AbstractTracker, RunInfo, Status
from editkit.trackers.guarded import attempt
from editkit.types import EvalRecord, SampleRecord, StepRecord
from editkit.wandb.client import Mode, Target, WandbRun, checked, run_id, sweep_run_id
from editkit.wandb.history import History


@dataclass(frozen=True, kw_only=True)
class Wandb(AbstractTracker):
    """Sends a run to W&B, and forwards every call to a second tracker, `beside` (usually the
    console).
    """

    beside: AbstractTracker
    mode: Mode
    project: str
    entity: str | None
    job_type: str
    tags: tuple[str, ...]
    max_samples: int  # rows of each table of generations
    figures: bool
    artifacts: bool
    timeout_s: float
    # The open W&B run, if any. The options are frozen; this list is not.
    _open: list[tuple[WandbRun, History]] = field(
        init=False, repr=False, compare=False, default_factory=list
    )

    def __post_init__(self) -> None:
        checked(self._target)

    def open(self, run: RunInfo) -> None:
        # First, since W&B's output would break the console's progress bar.
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

    @property
    def _target(self) -> Target:
        return Target(
            mode=self.mode,
            project=self.project,
            entity=self.entity,
            job_type=self.job_type,
            tags=self.tags,
            max_samples=self.max_samples,
            figures=self.figures,
            artifacts=self.artifacts,
            timeout_s=self.timeout_s,
        )

    def _begin(self, run: RunInfo) -> None:
        if self.mode == "disabled":
            return
        name = sweep_run_id() or run_id(run.folder)
        sent = WandbRun(run.folder, run.config, self._target, id=name, resume=run.resumed_at > 0)
        self._open.append(
            (
                sent,
                History(
                    trajectory=run.views[0], edits=min(run.resumed_at * run.batch_size, run.edits)
                ),
            )
        )
        sent.mark(pushed=None)

    def _send(self, action: Callable[[WandbRun, History], object]) -> None:
        if self._open and not self._attempt(lambda: action(*self._open[0])):
            self._open.clear()

    def _attempt(self, action: Callable[[], object]) -> bool:
        return attempt("W&B", action, self.beside.warning)
