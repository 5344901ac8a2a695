"""Measuring a model: as the edits left it, and each restrained view of it.

A restraint on the total that acts at evaluation changes only what is measured: W_0 + F(D) instead
of W_0 + D, while it is looked at.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from editkit.evaluation.base import AbstractEditEvaluator, AbstractSuite, Moment, Samples
from editkit.linalg.spectral import extreme_singular_values
from editkit.linalg.telemetry import module_record
from editkit.restraints.base import AbstractTotalRestraint
from editkit.runner.checkpoint import RunState
from editkit.runner.plan import Trajectory, digest_of, label
from editkit.types import EvalRecord, Measurement, SampleRecord

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update
    from editkit.linalg.total import Total

ROLLBACK = "rollback"  # the timing of what was measured on a model with one batch of edits in it


def corrections(
    restraint: AbstractTotalRestraint,
    totals: Mapping[str, Total],
    base_sigma_max: Mapping[str, float],
) -> dict[str, Update]:
    """What the restraint adds to each total; modules that it leaves alone are absent."""
    found = {
        module: restraint.correction(total, base_sigma_max[module])
        for module, total in totals.items()
    }
    return {module: correction for module, correction in found.items() if correction is not None}


def evaluate(job: Trajectory, state: RunState) -> Iterator[EvalRecord | SampleRecord]:
    """Measures the model as it is and each restrained view of it.

    A view that corrects nothing is the same model, which is not asked again; but what was noted of
    the view after earlier edits is its own.
    """
    own = {
        name: list(_ask(job, state, job.restraints.trajectory_view, name))
        for name in _due(job, state)
    }
    yield from itertools.chain.from_iterable(own.values())
    noting = _noting(job)
    for view, correction in restrained_views(job, state):
        with job.model.temporarily(correction):
            for name, records in own.items():
                is_same = not correction and name not in noting
                yield from (
                    (replace(record, view=view) for record in records)
                    if is_same
                    else _ask(job, state, view, name)
                )
            yield from weigh(job, state, view)


def restrained_views(job: Trajectory, state: RunState) -> Iterator[tuple[str, dict[str, Update]]]:
    """The views that exist only while they are looked at, and what makes each of them."""
    for name, restraint in job.restraints.totals.items():
        if restraint.apply_at == "evaluation":
            yield name, corrections(restraint, state.totals, state.base_sigma_max)


def note(job: Trajectory, state: RunState) -> RunState:
    """Measures a step's own edits, right after it, in every view; the state keeps the scores."""
    requests, baselines = job.batch(state.step), dict(state.baselines)

    def look(view: str) -> None:
        moment = Moment(view=view, positions=job.positions(state.step), is_alone=job.rollback)
        for name, evaluator in _noting(job).items():
            baselines[name] = evaluator.note(job.model, requests, baselines[name], moment)

    look(job.restraints.trajectory_view)
    for name, correction in restrained_views(job, state):
        with job.model.temporarily(correction):
            look(name)
    return replace(state, baselines=baselines)


def _noting(job: Trajectory) -> dict[str, AbstractEditEvaluator]:
    """The evaluators that note each step's edits right after it."""
    return {
        name: each
        for name, each in job.evaluators.items()
        if isinstance(each, AbstractEditEvaluator)
        and (job.rollback or ("immediate" in job.timings and each.is_immediate))
    }


def tell_batch(job: Trajectory, state: RunState) -> Iterator[EvalRecord]:
    """What was noted of the batch alone, which with rollback is a measurement of its own. Its parts
    and samples are told at milestones.
    """
    requests, block = job.batch(state.step), label(job.positions(state.step))
    for view in (
        job.restraints.trajectory_view,
        *(name for name, _ in restrained_views(job, state)),
    ):
        moment = Moment(view=view, positions=job.positions(state.step))
        for name, evaluator in job.evaluators.items():
            if isinstance(evaluator, AbstractEditEvaluator):
                for found in evaluator.noted(
                    requests, state.baselines[name], moment, timing=ROLLBACK
                ):
                    if isinstance(found, Measurement) and found.subset is None:
                        about = _about(job, state.step, moment.positions, block)
                        yield EvalRecord(
                            step=state.step,
                            view=view,
                            measurement=replace(found, block=block),
                            **about,
                        )


def weigh(job: Trajectory, state: RunState, view: str) -> Iterator[EvalRecord]:
    """The weights of a restrained view, which no step record can hold: they exist only while they
    are looked at.
    """
    for module, start in state.spectra.items():
        weight_OI = job.model.weight(module)
        figures = module_record(
            weight_OI, extreme_singular_values(weight_OI, start), None, state.totals[module]
        )
        for metric in ("condition_number", "sigma_max", "sigma_min", "l1_norm"):
            value = figures[metric] if math.isfinite(figures[metric]) else None
            measurement = Measurement(
                kind="weights",
                task=module,
                metric=metric,
                value=value,
                stderr=None,
                n=1,
                nonfinite=None,
            )
            yield EvalRecord(step=state.step, view=view, measurement=measurement)


def views(job: Trajectory) -> tuple[str, ...]:
    """Every view that the run measures: the trajectory's own first."""
    totals = job.restraints.totals
    return (
        job.restraints.trajectory_view,
        *(name for name, restraint in totals.items() if restraint.apply_at != "every"),
    )


def measure(job: Trajectory, state: RunState, view: str) -> Iterator[EvalRecord | SampleRecord]:
    """Every evaluator on the model as it stands: on all edits so far, or, before the first, on
    those to come.
    """
    for name in _due(job, state):
        yield from _ask(job, state, view, name)


def _due(job: Trajectory, state: RunState) -> list[str]:
    """The evaluators that are asked at this step; a suite may be asked more seldom."""
    suites = {
        name: each for name, each in job.evaluators.items() if isinstance(each, AbstractSuite)
    }
    return [
        name
        for name in job.evaluators
        if name not in suites or job.schedule.is_every(state.step, suites[name].every)
    ]


def _ask(
    job: Trajectory, state: RunState, view: str, name: str
) -> Iterator[EvalRecord | SampleRecord]:
    """One evaluator on the model as it stands.

    With rollback the model holds the last batch alone. Edits are told from the notes that were
    taken when the model held them; whatever takes no notes is measured with that batch, and its
    records say so: timing `rollback`, the digest of the batch's requests.
    """
    schedule, step = job.schedule, state.step
    moment = Moment(view=view, positions=job.measured(step), is_before=step == 0)
    requests = job.at(moment.positions)
    evaluator, baseline = job.evaluators[name], state.baselines[name]

    @functools.cache
    def about(block: str | None) -> Mapping[str, Any]:
        return _about(job, step, moment.positions, block)

    found: Sequence[Measurement | Samples]
    if job.rollback and step and not isinstance(evaluator, AbstractEditEvaluator):
        block = label(job.positions(step))
        found = [
            _of_the_batch(each, block)
            for each in evaluator.evaluate(job.model, job.batch(step), baseline)
        ]
    elif not isinstance(evaluator, AbstractEditEvaluator):
        found = evaluator.evaluate(job.model, requests, baseline)
    elif job.rollback and step:
        found = evaluator.noted(requests, baseline, moment, timing=ROLLBACK)
    else:
        found = evaluator.measure(job.model, requests, baseline, moment)
    for each in found:
        if isinstance(each, Samples):
            yield SampleRecord(step=step, view=view, name=each.name, rows=each.rows)
        elif each.kind != "editing":
            of = digest_of(job.batch(step)) if each.timing == ROLLBACK else None
            yield EvalRecord(step=step, view=view, measurement=each, requests=of)
        else:
            record = EvalRecord(step=step, view=view, measurement=each, **about(each.block))
            if step == 0:
                yield _timed(record, "before")
            elif each.timing is not None:
                yield record
            else:
                if schedule.is_milestone(step):
                    yield _timed(record, "milestone")
                is_last = step == schedule.last_step
                if is_last and "final" in job.timings and each.block is None:
                    yield _timed(record, "final")


def _timed(record: EvalRecord, timing: str) -> EvalRecord:
    return replace(record, measurement=replace(record.measurement, timing=timing))


def _of_the_batch(found: Measurement | Samples, block: str) -> Measurement | Samples:
    if isinstance(found, Samples):
        return found
    return replace(found, timing=ROLLBACK, block=block if found.kind == "editing" else found.block)


def _about(
    job: Trajectory, step: int, positions: Sequence[int], block: str | None
) -> dict[str, Any]:
    """Which requests editing metrics are about: those measured, or those of them in the block."""
    so_far = job.schedule.edits_at(step) or len(job.requests)
    first, last = (1, so_far) if block is None else map(int, block.split("-"))
    chosen = [position for position in positions if first <= position <= last]
    size = min(last, so_far) - first + 1
    return {
        "dataset": job.dataset,
        "requests": digest_of(job.at(chosen)),
        "sampled_from": size if len(chosen) < size else None,
    }
