"""Measuring a model: as the edits left it, and each restrained view of it.

A restraint on the total that acts at evaluation changes only what is measured: W_0 + F(D) instead of W_0 + D, while it is looked at.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from editkit.evaluation.base import AbstractEditEvaluator, AbstractEvaluator, AbstractSuite, Measurement, Moment, Samples
from editkit.linalg.spectral import extreme_singular_values
from editkit.linalg.telemetry import module_record
from editkit.restraints.base import AbstractTotalRestraint
from editkit.state import RunState
from editkit.trajectory import Trajectory, digest_of
from editkit.types import EditRequest, EvalRecord, SampleRecord, TensorState

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update
    from editkit.linalg.total import Total

UNRESTRAINED = "unrestrained"
ROLLBACK = "rollback"  # the timing of edits that were measured on an otherwise unedited model


def corrections(restraint: AbstractTotalRestraint, totals: Mapping[str, Total], base_sigma_max: Mapping[str, float]) -> dict[str, Update]:
    """What the restraint adds to each total; modules that it leaves alone are absent."""
    found = {module: restraint.correction(total, base_sigma_max[module]) for module, total in totals.items()}
    return {module: correction for module, correction in found.items() if correction is not None}


def evaluate(job: Trajectory, state: RunState) -> Iterator[EvalRecord | SampleRecord]:
    """Measures the model as it is and each restrained view of it. A view that corrects nothing is the same model: it is not asked again."""
    own = list(measure(job, state, trajectory_view(job)))
    yield from own
    for name, correction in restrained_views(job, state):
        if not correction:
            yield from (replace(record, view=name) for record in own)
            yield from weigh(job, state, name)
            continue
        with job.model.temporarily(correction):
            yield from measure(job, state, name)
            yield from weigh(job, state, name)


def restrained_views(job: Trajectory, state: RunState) -> Iterator[tuple[str, dict[str, Update]]]:
    """The views that exist only while they are looked at, and what makes each of them."""
    for name, restraint in job.restraints.totals.items():
        if restraint.apply_at == "evaluation":
            yield name, corrections(restraint, state.totals, state.base_sigma_max)


def note(job: Trajectory, state: RunState) -> RunState:
    """Measures a step's own edits, right after it, in every view; the state keeps the scores."""
    evaluators = {name: each for name, each in job.evaluators.items() if isinstance(each, AbstractEditEvaluator)}
    requests, baselines = job.batch(state.step), dict(state.baselines)

    def look(view: str) -> None:
        moment = Moment(view=view, positions=job.positions(state.step))
        for name, evaluator in evaluators.items():
            baselines[name] = evaluator.note(job.model, requests, baselines[name], moment)

    look(trajectory_view(job))
    for name, correction in restrained_views(job, state):
        with job.model.temporarily(correction):
            look(name)
    return replace(state, baselines=baselines)


def tell_batch(job: Trajectory, state: RunState) -> Iterator[EvalRecord]:
    """What was noted of the batch alone, which with rollback is a measurement of its own."""
    for view in (trajectory_view(job), *(name for name, _ in restrained_views(job, state))):
        moment = Moment(view=view, positions=job.positions(state.step))
        for name, evaluator in job.evaluators.items():
            if isinstance(evaluator, AbstractEditEvaluator):
                for found in evaluator.noted(state.baselines[name], moment, timing=ROLLBACK):
                    block = f"{moment.positions[0]}-{moment.positions[-1]}"
                    yield EvalRecord(step=state.step, view=view, **{**dataclasses.asdict(found), "block": block})


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
    schedule, step = job.schedule, state.step
    moment = Moment(view=view, positions=job.measured(step), is_before=step == 0)
    requests = tuple(job.requests[position - 1] for position in moment.positions)
    so_far = schedule.edits_at(step) or len(job.requests)
    about = {"dataset": job.dataset, "requests": digest_of(requests), "sampled_from": so_far if len(requests) < so_far else None}
    for name, evaluator in job.evaluators.items():
        if isinstance(evaluator, AbstractSuite) and not schedule.is_every(step, evaluator.every):
            continue
        for found in _ask(job, state, evaluator, requests, state.baselines[name], moment):
            if isinstance(found, Samples):
                yield SampleRecord(step=step, view=view, name=found.name, rows=found.rows)
            elif found.kind != "editing":
                yield EvalRecord(step=step, view=view, **dataclasses.asdict(found))
            else:
                record = EvalRecord(step=step, view=view, **{**dataclasses.asdict(found), **about})
                if step == 0:
                    yield replace(record, timing="before")
                elif record.timing is not None:
                    yield record
                else:
                    if schedule.is_milestone(step):
                        yield replace(record, timing="milestone")
                    if step == schedule.last_step and "final" in job.timings and record.block is None:
                        yield replace(record, timing="final")


def _ask(
    job: Trajectory,
    state: RunState,
    evaluator: AbstractEvaluator,
    requests: Sequence[EditRequest],
    baseline: TensorState,
    moment: Moment,
) -> Sequence[Measurement | Samples]:
    if not isinstance(evaluator, AbstractEditEvaluator):
        return evaluator.evaluate(job.model, requests, baseline)
    if job.rollback and state.step:  # the model holds the last batch alone; the others were measured when it held them
        return evaluator.noted(baseline, moment, timing=ROLLBACK)
    return evaluator.measure(job.model, requests, baseline, moment)
