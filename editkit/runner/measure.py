"""Measurements of a model: as the edits left it, and each restrained view of it.

A restraint on the total that acts at evaluation changes the model only while it is measured: it is
W_0 + F(D) then instead of W_0 + D.
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
from editkit.runner.side_routing import measure_routing
from editkit.types import EvalRecord, Measurement, SampleRecord

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update
    from editkit.linalg.total import Total

ROLLBACK = "rollback"  # the timing of measurements of a model that holds one batch of edits
ASKED = ("downstream", "comparison")  # the kinds of measurements of tasks, whose items are prompts


def corrections(
    restraint: AbstractTotalRestraint,
    totals: Mapping[str, Total],
    base_sigma_max: Mapping[str, float],
) -> dict[str, Update]:
    """The update that the restraint adds to each total, by module. Unchanged modules are absent."""
    corrections_by_module = {
        module: restraint.correction(total, base_sigma_max[module])
        for module, total in totals.items()
    }
    return {
        module: correction
        for module, correction in corrections_by_module.items()
        if correction is not None
    }


def evaluate(run: Trajectory, state: RunState) -> Iterator[EvalRecord | SampleRecord]:
    """Measures the model as it is and each restrained view of it.

    A view without corrections is the same model, which is not measured again. Evaluators with notes
    are: the notes of the view are its own.
    """
    own = {
        name: list(_measure_with(run, state, run.restraints.trajectory_view, name))
        for name in _due(run, state)
    }
    yield from itertools.chain.from_iterable(own.values())
    if state.step:
        yield from measure_routing(run, state, ROLLBACK if run.rollback else "milestone")
    noting = _noting(run)
    for view, correction in restrained_views(run, state):
        with run.model.temporarily(correction):
            for name, records in own.items():
                is_same = not correction and name not in noting
                yield from (
                    (replace(record, view=view) for record in records)
                    if is_same
                    else _measure_with(run, state, view, name)
                )
            yield from measure_weights(run, state, view)


def restrained_views(run: Trajectory, state: RunState) -> Iterator[tuple[str, dict[str, Update]]]:
    """The views that exist only while they are measured, with their corrections."""
    for name, restraint in run.restraints.totals.items():
        if restraint.apply_at == "evaluation":
            yield name, corrections(restraint, state.totals, state.base_sigma_max)


def note(run: Trajectory, state: RunState) -> RunState:
    """Measures a step's own edits right after it, in every view. The state keeps the notes."""
    requests, notes = run.batch(state.step), dict(state.notes)

    def note_view(view: str) -> None:
        moment = Moment(view=view, positions=run.positions(state.step), is_alone=run.rollback)
        for name, evaluator in _noting(run).items():
            former = notes.get(name, {})
            own = evaluator.note(run.model, requests, state.baselines[name], former, moment)
            if own:
                notes[name] = own

    note_view(run.restraints.trajectory_view)
    for name, correction in restrained_views(run, state):
        with run.model.temporarily(correction):
            note_view(name)
    return replace(state, notes=notes)


def _noting(run: Trajectory) -> dict[str, AbstractEditEvaluator]:
    """The evaluators that note each step's edits right after it."""
    return {
        name: evaluator
        for name, evaluator in run.evaluators.items()
        if isinstance(evaluator, AbstractEditEvaluator)
        and (run.rollback or ("immediate" in run.timings and evaluator.is_immediate))
    }


def measure_batch(run: Trajectory, state: RunState) -> Iterator[EvalRecord]:
    """The notes of the batch, which with rollback are a measurement of their own. Their parts and
    samples are reported at milestones.
    """
    requests, block = run.batch(state.step), label(run.positions(state.step))
    for view in (
        run.restraints.trajectory_view,
        *(name for name, _ in restrained_views(run, state)),
    ):
        moment = Moment(view=view, positions=run.positions(state.step))
        for name, evaluator in run.evaluators.items():
            if not isinstance(evaluator, AbstractEditEvaluator):
                continue
            kept = state.baselines[name], state.notes.get(name, {})
            for result in evaluator.noted(requests, *kept, moment, timing=ROLLBACK):
                if isinstance(result, Measurement) and result.subset is None:
                    measurement = replace(result, block=block)
                    about = _about(run, state.step, moment.positions, block)
                    yield EvalRecord(step=state.step, view=view, measurement=measurement, **about)


def measure_weights(run: Trajectory, state: RunState, view: str) -> Iterator[EvalRecord]:
    """The weights of a restrained view. No step record can hold them: they exist only while the
    view is measured.
    """
    for module, start in state.spectra.items():
        weight_OI = run.model.weight(module)
        figures = module_record(
            weight_OI, extreme_singular_values(weight_OI, start), None, state.totals[module]
        )
        for metric in ("condition_number", "sigma_max", "sigma_min", "l1_norm"):
            if metric not in figures:
                continue  # a vector has no condition number
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


def views(run: Trajectory) -> tuple[str, ...]:
    """All views that the run measures, the trajectory's own first."""
    totals = run.restraints.totals
    return (
        run.restraints.trajectory_view,
        *(name for name, restraint in totals.items() if restraint.apply_at != "every"),
    )


def measure(run: Trajectory, state: RunState, view: str) -> Iterator[EvalRecord | SampleRecord]:
    """The measurements of all evaluators that are due, on all edits so far; at step 0, on the edits
    to come.
    """
    for name in _due(run, state):
        yield from _measure_with(run, state, view, name)


def _due(run: Trajectory, state: RunState) -> list[str]:
    """The evaluators that measure at this step. A suite may measure at fewer milestones."""
    return [
        name
        for name, evaluator in run.evaluators.items()
        if not isinstance(evaluator, AbstractSuite)
        or run.schedule.is_every(state.step, evaluator.every)
    ]


def _measure_with(
    run: Trajectory, state: RunState, view: str, name: str
) -> Iterator[EvalRecord | SampleRecord]:
    """The measurements of one evaluator, of the model with its current weights.

    With rollback the model holds the last batch alone. Edits are reported from the notes, which
    were taken when the model held them. Evaluators without notes measure the model with that batch,
    and their records state it: timing `rollback`, and the digest of the batch's requests.
    """
    schedule, step = run.schedule, state.step
    moment = Moment(view=view, positions=run.measured(step), is_before=step == 0)
    requests = run.at(moment.positions)
    evaluator = run.evaluators[name]
    baseline, notes = state.baselines[name], state.notes.get(name, {})

    @functools.cache
    def about(block: str | None) -> Mapping[str, Any]:
        return _about(run, step, moment.positions, block)

    results: Sequence[Measurement | Samples]
    if run.rollback and step and not isinstance(evaluator, AbstractEditEvaluator):
        block = label(run.positions(step))
        results = [
            _of_the_batch(result, block)
            for result in evaluator.evaluate(run.model, run.batch(step), baseline)
        ]
    elif not isinstance(evaluator, AbstractEditEvaluator):
        results = evaluator.evaluate(run.model, requests, baseline)
    elif run.rollback and step:
        results = evaluator.noted(requests, baseline, notes, moment, timing=ROLLBACK)
    else:
        results = evaluator.measure(run.model, requests, baseline, notes, moment)
    for result in results:
        if isinstance(result, Samples):
            yield SampleRecord(step=step, view=view, name=result.name, rows=result.rows)
        elif result.kind != "editing":
            of = digest_of(run.batch(step)) if result.timing == ROLLBACK else None
            asked = _chat(run) if result.kind in ASKED else None
            yield EvalRecord(
                step=step, view=view, measurement=result, requests=of, chat_template=asked
            )
        else:
            record = EvalRecord(step=step, view=view, measurement=result, **about(result.block))
            if step == 0:
                yield _timed(record, "before")
            elif result.timing is not None:
                yield record
            else:
                if schedule.is_milestone(step):
                    yield _timed(record, "milestone")
                is_last = step == schedule.last_step
                if is_last and "final" in run.timings and result.block is None:
                    yield _timed(record, "final")


def _timed(record: EvalRecord, timing: str) -> EvalRecord:
    return replace(record, measurement=replace(record.measurement, timing=timing))


def _of_the_batch(result: Measurement | Samples, block: str) -> Measurement | Samples:
    if isinstance(result, Samples):
        return result
    return replace(
        result, timing=ROLLBACK, block=block if result.kind == "editing" else result.block
    )


def _about(
    run: Trajectory, step: int, positions: Sequence[int], block: str | None
) -> dict[str, Any]:
    """The requests that editing metrics are about: the measured ones, or those of the block."""
    so_far = run.schedule.edits_at(step) or len(run.requests)
    first, last = (1, so_far) if block is None else map(int, block.split("-"))
    chosen = [position for position in positions if first <= position <= last]
    size = min(last, so_far) - first + 1
    return {
        "dataset": run.dataset,
        "requests": digest_of(run.at(chosen)),
        "sampled_from": size if len(chosen) < size else None,
        "chat_template": _chat(run),
    }


def _chat(run: Trajectory) -> str | None:
    """How prompts are put to the model, for records of what prompts measure."""
    return run.model.chat.label if run.model.chat else None
