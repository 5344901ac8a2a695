"""Measuring a model: as the edits left it, and each restrained view of it.

A restraint on the total that acts at evaluation changes only what is measured: W_0 + F(D) instead of W_0 + D, while it is looked at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from editkit.evaluation.base import Samples
from editkit.linalg.spectral import extreme_singular_values
from editkit.linalg.telemetry import module_record
from editkit.restraints.base import AbstractTotalRestraint
from editkit.state import RunState
from editkit.trajectory import Trajectory
from editkit.types import EvalRecord, SampleRecord

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update
    from editkit.linalg.total import Total

UNRESTRAINED = "unrestrained"


def corrections(restraint: AbstractTotalRestraint, totals: Mapping[str, Total], base_sigma_max: Mapping[str, float]) -> dict[str, Update]:
    """What the restraint adds to each total; modules that it leaves alone are absent."""
    found = {module: restraint.correction(total, base_sigma_max[module]) for module, total in totals.items()}
    return {module: correction for module, correction in found.items() if correction is not None}


def evaluate(job: Trajectory, state: RunState) -> Iterator[EvalRecord | SampleRecord]:
    """Measures the model as it is and each restrained view of it."""
    yield from measure(job, state, trajectory_view(job))
    for name, restraint in job.restraints.totals.items():
        if restraint.apply_at == "evaluation":
            with job.model.temporarily(corrections(restraint, state.totals, state.base_sigma_max)):
                yield from measure(job, state, name)
                yield from weigh(job, state, name)


def weigh(job: Trajectory, state: RunState, view: str) -> Iterator[EvalRecord]:
    """The weights of a restrained view, which no step record can hold: they exist only while they are looked at."""
    for module, start in state.spectra.items():
        weight_OI = job.model.weight(module)
        figures = module_record(weight_OI, extreme_singular_values(weight_OI, start), None, state.totals[module])
        for metric in ("condition_number", "sigma_max", "sigma_min", "l1_norm"):
            value = figures[metric] if math.isfinite(figures[metric]) else None
            yield EvalRecord(step=state.step, view=view, kind="weights", task=module, metric=metric, value=value, stderr=None, n=1)


def trajectory_view(job: Trajectory) -> str:
    """What the model itself is called: a total that is restrained in the loop leaves nothing unrestrained to look at."""
    return "+".join(name for name, restraint in job.restraints.totals.items() if restraint.apply_at == "every") or UNRESTRAINED


def views(job: Trajectory) -> tuple[str, ...]:
    """Every view that the run measures: the trajectory's own first."""
    return (trajectory_view(job), *(name for name, restraint in job.restraints.totals.items() if restraint.apply_at != "every"))


def measure(job: Trajectory, state: RunState, view: str) -> Iterator[EvalRecord | SampleRecord]:
    """Every evaluator on the model as it stands: on all edits so far, or, before the first, on those to come."""
    requests = job.requests[: job.schedule.edits_at(state.step) or None]
    timing = "milestone" if state.step else "before"
    for name, evaluator in job.evaluators.items():
        for found in evaluator.evaluate(job.model, requests, state.baselines[name]):
            if isinstance(found, Samples):
                yield SampleRecord(step=state.step, view=view, name=found.name, rows=found.rows)
                continue
            yield EvalRecord(step=state.step, view=view, timing=timing if found.kind == "editing" else None, **dataclasses.asdict(found))
