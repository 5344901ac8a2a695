"""An experiment as a value: everything that a run needs to know, checked, before a model is
loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from editkit.config.schedule import Schedule
from editkit.datasets.base import LoadedDataset
from editkit.editors.base import AbstractEditor
from editkit.errors import ConfigError
from editkit.evaluation.base import AbstractEvaluator
from editkit.evaluation.editing import EditingEvaluator
from editkit.linalg.recursive import SolveDtype
from editkit.records.tracker import AbstractTracker
from editkit.restraints.base import Restraints
from editkit.stats.corpus import StatsConfig

if TYPE_CHECKING:
    from editkit.model.load import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The machine's part of a run; it changes rounding at most."""

    device: str
    threads: int | None
    memory_gb: float | None = None  # that a run may take on the device; None: what is free there
    statistics: Literal["device", "cpu", "disk"] = (
        "device"  # where second moments and their factors lie
    )
    base: Literal["device", "cpu"] = "device"  # where W_0 of the edited matrices lies

    def __post_init__(self) -> None:
        problems = []
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device):
            problems.append(
                f"runtime.device: {self.device!r} was given; cpu, cuda, cuda:<number> or mps."
            )
        if self.threads is not None and self.threads < 1:
            problems.append(
                f"runtime.threads: {self.threads} was given; at least 1, or null for torch's own choice."
            )
        if self.memory_gb is not None and not self.memory_gb > 0:
            problems.append(
                f"runtime.memory_gb: {self.memory_gb} was given; more than 0, or null for what is free on the device."
            )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class Every:
    """A rhythm, in batches."""

    every: int


@dataclass(frozen=True, kw_only=True)
class Solve:
    """How least squares are computed."""

    dtype: SolveDtype


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Where things are written."""

    outputs: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The values at the root of the configuration; `conf/config.yaml` says what each means."""

    name: str | None
    experiment_name: str
    seed: int
    edits: int
    batch_size: int
    rollback: bool
    milestones: tuple[int, ...] | None
    resume: Literal["auto", "never"]
    retry_failed: bool
    when_locked: Literal["leave", "wait"]
    on_collapse: Literal["stop", "continue"]
    checkpoint: Every
    telemetry: Every
    solve: Solve
    paths: Paths

    def problems(self) -> list[str]:
        """What is out of range; no error, so that the rest of the configuration is looked at all
        the same.
        """
        least = {
            "seed": (self.seed, 0),
            "edits": (self.edits, 1),
            "batch_size": (self.batch_size, 1),
        }
        least |= {
            "checkpoint.every": (self.checkpoint.every, 1),
            "telemetry.every": (self.telemetry.every, 1),
        }
        problems = [
            f"{key}: {value} was given; at least {limit} is needed."
            for key, (value, limit) in least.items()
            if value < limit
        ]
        if outside := [
            str(milestone)
            for milestone in self.milestones or ()
            if not 0 <= milestone <= self.edits
        ]:
            problems.append(
                f"milestones: {', '.join(outside)} was given; edits={self.edits} allows 0 to {self.edits}."
            )
        for key, name in {"name": self.name, "experiment_name": self.experiment_name}.items():
            if name is not None and not re.fullmatch(r"[\w.+=-]*\w[\w.+=-]*", name):
                problems.append(
                    f"{key}: {name!r} was given; a folder's name of letters, digits and . _ + = - is needed."
                )
        return problems

    @property
    def schedule(self) -> Schedule:
        chosen = (
            (self.edits // 10, self.edits // 2, self.edits)
            if self.milestones is None
            else self.milestones
        )
        return Schedule(
            edits=self.edits,
            batch_size=self.batch_size,
            milestones=tuple(
                sorted({0, *chosen})
            ),  # every number needs what it was before the first edit
            telemetry_every=self.telemetry.every,
            checkpoint_every=self.checkpoint.every,
        )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What `editkit.runner.session.run` runs."""

    name: str
    model: ModelConfig
    editor: AbstractEditor
    restraints: Restraints
    data: LoadedDataset
    evaluation: EditingEvaluator  # its options that are the runner's: timings, how many requests
    evaluators: Mapping[
        str, AbstractEvaluator
    ]  # "editing" and its companions, and "suite" for the downstream tasks
    stats: StatsConfig
    solve: Solve
    tracker: AbstractTracker
    runtime: Runtime
    schedule: Schedule
    seed: int
    rollback: bool
    resume: Literal["auto", "never"]
    retry_failed: bool  # of a sweep's cells; a single run always tries again
    when_locked: Literal["leave", "wait"]
    on_collapse: Literal["stop", "continue"]
    folder: Path  # outputs/<experiment_name>/<name>-<hash>/seed<k>
    config: Mapping[str, Any]  # resolved, plain values; building it again gives the same experiment

    @property
    def edits(self) -> int:
        return self.schedule.edits
