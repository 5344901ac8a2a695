"""A checked experiment as a value: everything that a run needs before a model is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from editkit.config.schedule import Schedule
from editkit.datasets.base import LoadedDataset
from editkit.editors.base import AbstractAnyEditor
from editkit.errors import OptionError, message
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


Timing = Literal["milestone", "immediate", "final"]


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """When edits are measured, and how many: options of `evaluation` that the runner applies.

    Raises:
        OptionError: an option is out of range.
    """

    timings: tuple[Timing, ...] = ("milestone",)
    # The size of a seeded sample of the edits so far, at a milestone; None: all of them.
    max_requests: int | None = None

    def __post_init__(self) -> None:
        if self.max_requests is not None and self.max_requests < 1:
            got = self.max_requests
            raise OptionError(
                message("max_requests", "out of range", got=got, expected="at least 1")
            )


@dataclass(frozen=True, kw_only=True)
class Every:
    """An interval in batches."""

    every: int


@dataclass(frozen=True, kw_only=True)
class Solve:
    """Options of the least-squares solve."""

    dtype: SolveDtype


@dataclass(frozen=True, kw_only=True)
class LedgerOptions:
    """Whether a run keeps each edit's factors, and what is written beside them."""

    keep: bool = False
    author: str | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Paths:
    """Folders that are written to."""

    outputs: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The values at the root of the configuration. `conf/config.yaml` documents them."""

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
    ledger: LedgerOptions = LedgerOptions()

    def problems(self) -> list[str]:
        """The values that are out of range. They are returned and not raised, so that the rest of
        the configuration is checked as well.
        """
        minima = {
            "seed": (self.seed, 0),
            "edits": (self.edits, 1),
            "batch_size": (self.batch_size, 1),
            "checkpoint.every": (self.checkpoint.every, 1),
            "telemetry.every": (self.telemetry.every, 1),
        }
        problems = [
            message(key, "out of range", got=value, expected=f"at least {minimum}")
            for key, (value, minimum) in minima.items()
            if value < minimum
        ]
        outside = [
            milestone for milestone in self.milestones or () if not 0 <= milestone <= self.edits
        ]
        if outside:
            expected = f"numbers from 0 to edits={self.edits}"
            problems.append(message("milestones", "out of range", got=outside, expected=expected))
        for key, name in {"name": self.name, "experiment_name": self.experiment_name}.items():
            if name is not None and not re.fullmatch(r"(?=.{1,100}$)[\w.+=-]*\w[\w.+=-]*", name):
                expected = "at most 100 letters, digits and . _ + = -"
                problems.append(message(key, "not a folder name", got=name, expected=expected))
        return problems

    @property
    def schedule(self) -> Schedule:
        milestones = self.milestones
        if milestones is None:
            milestones = (self.edits // 10, self.edits // 2, self.edits)
        return Schedule(
            edits=self.edits,
            batch_size=self.batch_size,
            # The unedited model is always measured: every later number is compared with it.
            milestones=tuple(sorted({0, *milestones})),
            telemetry_every=self.telemetry.every,
            checkpoint_every=self.checkpoint.every,
        )


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What `editkit.runner.session.run` runs."""

    name: str
    model: ModelConfig
    editor: AbstractAnyEditor[Any]
    restraints: Restraints
    data: LoadedDataset
    evaluation: EditingEvaluator
    measuring: Measuring
    # "editing" with its companions, and "suite" for the downstream tasks
    evaluators: Mapping[str, AbstractEvaluator]
    stats: StatsConfig
    solve: Solve
    tracker: AbstractTracker
    runtime: Runtime
    schedule: Schedule
    seed: int
    rollback: bool
    resume: Literal["auto", "never"]
    retry_failed: bool  # for the cells of a sweep; a single run is always retried
    when_locked: Literal["leave", "wait"]
    on_collapse: Literal["stop", "continue"]
    folder: Path  # outputs/<experiment_name>/<name>-<hash>/seed<k>
    config: Mapping[str, Any]  # resolved, plain values; building it again gives the same experiment
    ledger: LedgerOptions = LedgerOptions()

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
    editor: AbstractAnyEditor[Any],
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
        is_short=stats.source in ("world", "facts"),
        is_imported=stats.source == "imported",
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
