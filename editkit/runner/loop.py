"""The loop: applies batches of edits one after another and yields what it saw. It neither logs nor
writes; the session does.

It yields a `StepRecord` after every step, `EvalRecord`s and `SampleRecord`s at milestones, and the
`RunState` where a checkpoint is due. Going on from a yielded state gives the same records and the
same bits as never having stopped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.linalg.lowrank import is_finite
from editkit.linalg.spectral import Spectrum, extreme_singular_values
from editkit.linalg.telemetry import module_record
from editkit.resources.stopwatch import Stopwatch
from editkit.restraints.base import AbstractTotalRestraint, Norms
from editkit.runner.checkpoint import RunState, generator_states, restore_generators
from editkit.runner.measure import corrections, evaluate, measure, note, tell_batch, weigh
from editkit.runner.plan import Collapse, Trajectory
from editkit.stats.least_squares import LeastSquares, least_squares
from editkit.types import EvalRecord, SampleRecord, StepRecord

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update

Event = StepRecord | EvalRecord | SampleRecord | RunState


def run_edits(job: Trajectory, state: RunState | None = None) -> Iterator[Event]:
    """Edits from the beginning, or on from `state`. Raises Collapse after the state was yielded, if
    told to stop there.
    """
    job.model.edit(job.editor.modules(job.model))
    if state is None:
        state = origin = begin(job)
        yield StepRecord(step=0, modules=describe(job, state.spectra, {}))
        if job.schedule.is_milestone(0):
            yield from evaluate(job, state)
        yield state
    else:
        origin = unedited(job, state) if job.rollback else state
        job.model.restore(state.totals)
        restore_generators(state.rng)
    for step in range(state.step + 1, job.schedule.last_step + 1):
        before = state
        if job.rollback:
            job.model.restore(origin.totals)
            before = replace(state, totals=origin.totals, editor=origin.editor, solve=origin.solve)
        record, state_after = take_step(job, step, before)
        if record.nonfinite and job.on_collapse == "stop":
            yield state  # the last sound one: going on from it meets the same collapse again
            yield record
            raise Collapse(record)
        state = note(job, state_after) if job.notes_every_step else state_after
        yield record
        if job.rollback and job.schedule.batch_size > 1:
            yield from tell_batch(job, state)
        if job.schedule.is_measured(step):
            yield from evaluate(job, state)
        if step == job.schedule.last_step:
            unrestrained = state.totals
            for name, restraint in job.restraints.totals.items():
                if restraint.apply_at == "end":
                    restrain_trajectory(job, restraint, state)
                    state = replace(state, totals=job.model.totals(), before_end=unrestrained)
                    yield from measure(job, state, name)
                    yield from weigh(job, state, name)
        stopping = job.should_stop()  # asked once: the answer may change while the state is written
        if job.schedule.has_checkpoint(step) or stopping:
            yield state
        if stopping:
            return


def begin(job: Trajectory) -> RunState:
    """The state of the unedited model: contexts, frozen answers, spectra. Reads the model only."""
    torch.manual_seed(job.seed)  # for editors that draw from the global generators
    generator = torch.Generator().manual_seed(job.seed)
    spectra = {
        module: extreme_singular_values(job.model.weight(module), None)
        for module in job.editor.modules(job.model)
    }
    base_sigma_max = {module: spectrum.sigma_max for module, spectrum in spectra.items()}
    return RunState(
        step=0,
        totals=job.model.totals(),
        contexts=job.editor.contexts(job.model, generator)
        if job.contexts is None
        else job.contexts,
        editor=job.editor.init(job.model, job.moments),
        solve={}
        if job.restraints.solve is None
        else job.restraints.solve.init(job.model, job.moments),
        baselines={
            name: evaluator.baseline(job.model, job.ever_measured())
            for name, evaluator in job.evaluators.items()
        },
        spectra=spectra,
        base_sigma_max=base_sigma_max,
        rng=generator_states(),
        inputs=job.inputs,
    )


def unedited(job: Trajectory, state: RunState) -> RunState:
    """The state with all edits taken back, of a model that has none yet."""
    solver = job.restraints.solve
    solve = {} if solver is None else solver.init(job.model, job.moments)
    return replace(
        state,
        totals=job.model.totals(),
        editor=job.editor.init(job.model, job.moments),
        solve=solve,
    )


def take_step(job: Trajectory, step: int, state: RunState) -> tuple[StepRecord, RunState]:
    """One batch of edits. The only writes are `model.apply`."""
    model, editor, requests, clock = (
        job.model,
        job.editor,
        job.batch(step),
        Stopwatch(job.model.device, job.peaks),
    )
    solver = job.restraints.solve
    with clock.phase("target"):
        plan = editor.plan(model, requests, state.contexts, state.editor, job.restraints.objective)
    nonfinite = plan.nonfinite
    problems: list[LeastSquares] = []

    def solve(problem: LeastSquares) -> Update:
        problems.append(problem)
        return (
            least_squares(problem, job.moments)
            if solver is None
            else solver.solve(problem, state.solve, job.moments)
        )

    applied: dict[str, tuple[Update, float]] = {}
    for module in editor.modules(model) if nonfinite is None else ():
        with clock.phase("solve"):
            update = editor.propose(model, requests, module, plan, state.editor, job.moments, solve)
            weight_OI = model.weight(module)
            base = Norms(
                sigma_max=state.base_sigma_max[module], frobenius=model.base_frobenius(module)
            )
            for restraint in job.restraints.updates:
                update = restraint.restrain(update.to(device=weight_OI.device), weight_OI, base)
            if not is_finite(update):
                nonfinite = f"update of {module}"
                break
        with clock.phase("apply"):
            applied[module] = (update, model.apply(module, update))
    with clock.phase("solve"):
        editor_state, solve_state = state.editor, state.solve
        if nonfinite is None:
            editor_state = editor.observe(model, requests, state.editor)
            if solver is not None:
                for problem in problems:
                    solve_state = solver.observe(problem, solve_state, job.moments)
    for total_restraint in job.restraints.totals.values():
        if (
            total_restraint.apply_at == "every"
            and total_restraint.every
            and step % total_restraint.every == 0
        ):
            with clock.phase("restrain"):
                restrain_trajectory(job, total_restraint, state)
    with clock.phase("telemetry"):
        spectra: Mapping[str, Spectrum] = state.spectra
        modules: Mapping[str, Mapping[str, float]] = {}
        if job.schedule.has_telemetry(step):
            spectra = {
                module: extreme_singular_values(model.weight(module), start)
                for module, start in state.spectra.items()
            }
            modules = describe(job, spectra, applied)
    nonfinite = nonfinite or model.nonfinite_module()
    record = StepRecord(
        step=step,
        requests=tuple(request.id for request in requests),
        seconds=clock.seconds,
        target=plan.summary,
        modules=modules,
        nonfinite=nonfinite,
    )
    state = replace(
        state,
        step=step,
        totals=model.totals(),
        editor=editor_state,
        solve=solve_state,
        spectra=spectra,
        rng=generator_states(),
    )
    return record, state


def restrain_trajectory(
    job: Trajectory, restraint: AbstractTotalRestraint, state: RunState
) -> None:
    """Writes a restrained total back into the model, so that later edits see it."""
    for module, correction in corrections(
        restraint, job.model.totals(), state.base_sigma_max
    ).items():
        job.model.apply(module, correction)


def describe(
    job: Trajectory, spectra: Mapping[str, Spectrum], applied: Mapping[str, tuple[Update, float]]
) -> dict[str, Mapping[str, float]]:
    """The telemetry of every edited matrix."""
    records: dict[str, Mapping[str, float]] = {}
    for module, spectrum in spectra.items():
        update, rounding_error = applied.get(module, (None, 0.0))
        records[module] = module_record(
            job.model.weight(module),
            spectrum,
            update=update,
            total=job.model.total(module),
            rounding_error=rounding_error,
        )
    return records
