"""What the trials of a search achieved, read from the folders of their runs: the rows of its table
and the best trial.

The score of a trial is the harmonic mean of efficacy, generalization and locality, of its single
edits and, if there is one, of its sequence: MEMIT's editing score (arXiv 2210.07229, section 5.2),
over both. Its standard error follows by the delta method from those of the metrics, as if they were
independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from editkit.errors import ConfigError, message
from editkit.records.means import harmonic_mean
from editkit.records.reader import RunRecords, load_run
from editkit.sweeps.plan import Plan, load_plan
from editkit.sweeps.state import STATES, State
from editkit.sweeps.summary import cell_status, statuses_of
from editkit.tuning.prepare import Trial, Tuning
from editkit.types import EvalRecord

METRICS = ("efficacy", "generalization", "locality")
# Takes the place of a metric that a dataset has no prompts for (zsRE).
OTHERWISE = {"locality": "locality_out_of_distribution"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A measured metric of one run of a trial."""

    arm: str  # single or sequential
    metric: str
    value: float  # 0 if the measured value is not finite
    stderr: float | None
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A trial and what it achieved."""

    trial: Trial
    values: Mapping[str, str]  # by searched key
    state: State  # done, failed, ...; of the run that is least far
    numbers: tuple[Number, ...]
    score: float | None  # None unless every run is done
    stderr: float | None
    seconds: float | None  # of an edit, on average


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """All rows by score, the best one first."""

    rows: tuple[Row, ...]
    protocol: str | None  # of the score; None if nothing was measured

    @property
    def best(self) -> Row | None:
        return self.rows[0] if self.rows and self.rows[0].score is not None else None

    @property
    def is_complete(self) -> bool:
        """Whether every trial has ended."""
        return all(row.state in ("done", "failed") for row in self.rows)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of the score."""
        return tuple(dict.fromkeys(number.metric for row in self.rows for number in row.numbers))


def outcome(tuning: Tuning) -> Outcome:
    """The results so far, read from the runs of the search.

    Raises:
        ConfigError: the folder has the plan of another search.
    """
    plan = load_plan(tuning.folder)
    listed = tuning.cells
    if len(plan.cells) != len(listed) or any(
        cell.overrides[-len(own) :] != own for cell, own in zip(plan.cells, listed, strict=True)
    ):
        problem = "another search was started in this folder meanwhile"
        fix = "wait until it ends, and repeat the command"
        raise ConfigError(message(str(tuning.folder), problem, fix=fix))
    statuses = statuses_of(plan, tuning.folder)
    runs: dict[int, RunRecords] = {}
    for index, run in enumerate(plan.runs):
        if statuses[index].state == "done":
            try:
                runs[index] = load_run(run.folder)
            except ConfigError:
                continue
    protocol = _protocol(runs.values())
    states = [cell_status(cell, statuses).state for cell in plan.cells]
    rows = [_row(trial, tuning, plan, states, runs, protocol) for trial in tuning.trials]
    ordered = sorted(
        rows, key=lambda row: (row.score is None, -(row.score or 0.0), row.trial.number)
    )
    return Outcome(rows=tuple(ordered), protocol=protocol)


def _row(
    trial: Trial,
    tuning: Tuning,
    plan: Plan,
    states: Sequence[State],
    runs: Mapping[int, RunRecords],
    protocol: str | None,
) -> Row:
    arms = tuple(tuning.arms)
    cells = plan.cells[trial.number * len(arms) : (trial.number + 1) * len(arms)]
    numbers: list[Number] = []
    seconds: list[float] = []
    for arm, cell in zip(arms, cells, strict=True):
        run = runs.get(cell.run) if cell.run is not None else None
        if run is None or protocol is None:
            continue
        numbers += _numbers(run, arm, cell.views[-1], protocol)
        seconds += [math.fsum(step.seconds.values()) for step in run.steps if step.step]
    is_done = all(cell.run in runs for cell in cells) and bool(numbers)
    score, stderr = combined(numbers) if is_done else (None, None)
    return Row(
        trial=trial,
        values={each.key: _value(trial, each.key) for each in tuning.dimensions},
        state=max((states[cell.number] for cell in cells), key=STATES.index),
        numbers=tuple(numbers),
        score=score,
        stderr=stderr,
        seconds=math.fsum(seconds) / len(seconds) if seconds else None,
    )


def _value(trial: Trial, key: str) -> str:
    """A searched value as the trial sets it, or as it is configured."""
    from editkit.sweeps.merge import literal

    for override in trial.overrides:
        name, _, text = override.partition("=")
        if name == key:
            return text
    node: object = trial.config
    for part in key.split("."):
        node = node[part] if isinstance(node, Mapping) else None
    return literal(node)


def _numbers(run: RunRecords, arm: str, view: str, protocol: str) -> Iterator[Number]:
    """The metrics after the last edit."""
    last = max((record.step for record in run.evals), default=0)
    for metric in METRICS:
        for name in (metric, OTHERWISE.get(metric)):
            found = _measured(run.evals, step=last, view=view, metric=name, protocol=protocol)
            if found is not None:
                measurement = found.measurement
                yield Number(
                    arm=arm,
                    metric=str(name),
                    value=measurement.value or 0.0,
                    stderr=measurement.stderr,
                    n=measurement.n,
                )
                break


def _measured(
    evals: Sequence[EvalRecord], *, step: int, view: str, metric: str | None, protocol: str
) -> EvalRecord | None:
    for record in evals:
        measurement = record.measurement
        if (
            (record.step, record.view) == (step, view)
            and (measurement.metric, measurement.protocol) == (metric, protocol)
            and measurement.kind == "editing"
            and not measurement.is_part
            and measurement.timing in ("milestone", "rollback")
        ):
            return record
    return None


def _protocol(runs: Iterable[RunRecords]) -> str | None:
    """The first of evaluation.protocols with which edits of this dataset are measured."""
    for run in runs:
        measured = {
            record.measurement.protocol
            for record in run.evals
            if record.measurement.metric == "efficacy"
        }
        for protocol in (run.config.get("evaluation") or {}).get("protocols", ()):
            if protocol in measured:
                return str(protocol)
    return None


def combined(numbers: Sequence[Number]) -> tuple[float, float | None]:
    """The harmonic mean and its standard error. The error is None if that of a number is."""
    mean = harmonic_mean([number.value for number in numbers])
    if mean <= 0 or any(number.stderr is None for number in numbers):
        return mean, None
    # d mean / d value
    slopes = [mean * mean / (len(numbers) * number.value**2) for number in numbers]
    errors = [slope * (number.stderr or 0.0) for slope, number in zip(slopes, numbers, strict=True)]
    return mean, math.sqrt(math.fsum(error * error for error in errors))
