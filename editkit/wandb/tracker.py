"""Weights & Biases in addition to the run's files.

Each cell has one W&B run, also if many cells share a process. Its id is made of the cell's folder,
so that a resumed run continues in it and `editkit push` finds it again. The x axis of all panels is
`edit/step`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from editkit.records.tracker import RunInfo
from editkit.trackers.remote import AbstractRemote, cell_id
from editkit.wandb.client import Mode, Target, WandbRun, checked, sweep_run_id


@dataclass(frozen=True, kw_only=True)
class Wandb(AbstractRemote):
    """Sends a run to W&B, and forwards every call to a second tracker, `beside` (usually the
    console).
    """

    title: ClassVar[str] = "W&B"

    mode: Mode
    project: str
    entity: str | None
    job_type: str
    tags: tuple[str, ...]
    max_samples: int  # rows of each table of generations
    figures: bool
    artifacts: bool
    timeout_s: float

    def __post_init__(self) -> None:
        checked(self._target)

    def connect(self, run: RunInfo) -> WandbRun | None:
        if self.mode == "disabled":
            return None
        name = sweep_run_id() or cell_id(run.folder)
        sent = WandbRun(run.folder, run.config, self._target, id=name, resume=run.resumed_at > 0)
        sent.mark(pushed=None)
        return sent

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
