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
from editkit.evaluation.base import AbstractEvaluator
from editkit.evaluation.editing import EditingEvaluator
from editkit.linalg.recursive import SolveDtype
from editkit.records.tracker import AbstractTracker
from editkit.resources.footprint import Corpus, Demand
from editkit.resources.runtime import Runtime
from editkit.restraints.base import Restraints
from editkit.stats.corpus import StatsConfig

if TYPE_CHECKING:
    from editkit.model.load import ModelConfig


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
    editor: AbstractEditor[Any]
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

    @property
    def demand(self) -> Demand:
        """The parts that memory depends on."""
        return demand_of(
            model=self.model,
            editor=self.editor,
            restraints=self.restraints,
            stats=self.stats,
            solve=self.solve,
            runtime=self.runtime,
            evaluation=self.evaluation,
            edits=self.schedule.edits,
            batch_size=self.schedule.batch_size,
        )


def demand_of(
    *,
    model: ModelConfig,
    editor: AbstractEditor[Any],
    restraints: Restraints,
    stats: StatsConfig,
    solve: Solve,
    runtime: Runtime,
    evaluation: EditingEvaluator,
    edits: int,
    batch_size: int,
) -> Demand:
    """What the memory estimate reads of these parts."""
    corpus = Corpus(
        folder=Path(stats.folder).expanduser(),
        batch_tokens=stats.batch_tokens,
        context_length=stats.context_length,
        is_short=stats.source == "world",
    )
    return Demand(
        model=model,
        editor=editor,  # type: ignore[arg-type] # its `modules` takes an outline for a model
        solve=restraints.solve,
        solve_dtype=solve.dtype,
        runtime=runtime,
        edits=edits,
        batch_size=batch_size,
        measuring_tokens=evaluation.tokens_per_batch,
        corpus=corpus,
    )
