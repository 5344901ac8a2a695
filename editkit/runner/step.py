"""One step: a batch of edits is planned, solved module by module, restrained and applied; or what
it puts beside the weights is attached.

`apply_batch` is the only place of the package that asks an editor for proposals and writes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from editkit.editors.base import AbstractAnyEditor, AbstractEditor, AbstractSideEditor, Plan, Step
from editkit.errors import keys_under
from editkit.linalg.lowrank import is_finite
from editkit.linalg.spectral import Spectrum, extreme_singular_values
from editkit.linalg.telemetry import module_record
from editkit.linalg.total import Total
from editkit.resources.stopwatch import Stopwatch
from editkit.restraints.base import AbstractTotalRestraint, Norms, Restraints
from editkit.runner.checkpoint import RunState, generator_states
from editkit.runner.measure import corrections
from editkit.runner.plan import Trajectory
from editkit.stats.least_squares import LeastSquares, least_squares
from editkit.types import StepRecord

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update
    from editkit.model.editable import EditableModel
    from editkit.model.side_value import AbstractBeside
    from editkit.stats.store import Moments
    from editkit.types import TensorState


@dataclass(frozen=True, kw_only=True)
class AppliedBatch:
    """A batch after its updates were written."""

    plan: Plan
    nonfinite: str | None  # the first number that was not finite; nothing was written from there on
    # by module, each with its rounding error
    updates: Mapping[str, tuple[Update, float]] = field(default_factory=dict)
    problems: tuple[LeastSquares, ...] = ()  # the least squares that were solved, in order
    side: TensorState | None = None  # what stands beside the weights; None: the editor writes them
    sides: tuple[AbstractBeside, ...] = ()  # as it is attached


def first_states(
    model: EditableModel, editor: AbstractAnyEditor[Any], restraints: Restraints, moments: Moments
) -> tuple[TensorState, TensorState]:
    """The states of the editor and of the restraint on the solve, before the first edit."""
    with keys_under("editor"):
        editor_state = editor.init(model, moments)
    if restraints.solve is None:
        return editor_state, {}
    with keys_under(f"restraint.{restraints.solve_name}"):
        return editor_state, restraints.solve.init(model, moments)


def apply_batch(
    step: Step,
    editor: AbstractAnyEditor[Any],
    restraints: Restraints,
    *,
    base_sigma_max: Mapping[str, float],
    solve_state: TensorState,
    clock: Stopwatch,
) -> AppliedBatch:
    """Plans a batch and writes its updates into the model, module by module, or attaches what the
    editor puts beside the weights.

    With a restraint of base `unedited`, targets, keys and residuals are those of the unedited
    model: each matrix is W_0 until its own update is written.

    Args:
        step: without a solver; the restraint on the solve is added here.
        base_sigma_max: sigma_max(W_0) by module.
        solve_state: the state of the restraint on the solve, from before this batch.
    """
    if isinstance(editor, AbstractSideEditor):
        return _attach_batch(step, editor, clock)
    assert isinstance(editor, AbstractEditor)  # there are two kinds
    model, problems, solver = step.model, list[LeastSquares](), restraints.solve
    modules = editor.modules(model)
    at_base = modules if solver is not None and solver.base == "unedited" else ()

    def solve(problem: LeastSquares) -> Update:
        problem = replace(
            problem,
            total=partial(model.total_times, problem.module),
            matrix=partial(model.edited_weight, problem.module),
        )
        if at_base:  # the total writes a part of what the unedited matrix lacks
            written_ON = model.total_times(problem.module, problem.keys_IN)
            residuals_ON = problem.residuals_ON - written_ON.to(problem.residuals_ON)
            problem = replace(problem, residuals_ON=residuals_ON)
        problems.append(problem)
        if solver is None:
            return least_squares(problem, step.moments)
        return solver.solve(problem, solve_state, step.moments)

    step = replace(step, solver=solve)
    updates: dict[str, tuple[Update, float]] = {}
    with model.unedited(at_base):
        with clock.phase("target"), keys_under("editor"):
            plan = editor.plan(step)
        nonfinite = plan.nonfinite
        for module in modules if nonfinite is None else ():
            with clock.phase("solve"):
                update = editor.propose(step, module, plan)
                if restraints.updates:
                    update = _restrained(update, module, model, restraints, base_sigma_max[module])
                if not is_finite(update):
                    nonfinite = f"update of {module}"
                    break
            with clock.phase("apply"):
                updates[module] = (update, model.apply(module, update))
    return AppliedBatch(plan=plan, updates=updates, problems=tuple(problems), nonfinite=nonfinite)


def _attach_batch(step: Step, editor: AbstractSideEditor[Any], clock: Stopwatch) -> AppliedBatch:
    """Plans a batch and puts what the editor proposes beside the weights."""
    with clock.phase("target"), keys_under("editor"):
        plan = editor.plan(step)
    if plan.nonfinite is not None:
        return AppliedBatch(plan=plan, nonfinite=plan.nonfinite)
    with clock.phase("solve"):
        state = editor.propose(step, plan)
        numbers = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
        bad = [name for name, tensor in numbers.items() if not bool(tensor.isfinite().all())]
    if bad:
        return AppliedBatch(plan=plan, nonfinite=f"side {bad[0]}")
    with clock.phase("apply"):
        sides = editor.attach(step.model, state)
        step.model.attach(*step.others, *sides)
    return AppliedBatch(plan=plan, nonfinite=None, side=state, sides=sides)


def attach(model: EditableModel, editor: AbstractAnyEditor[Any], state: TensorState) -> None:
    """Puts the state of an editor beside the weights. Nothing happens for an editor of weights."""
    if isinstance(editor, AbstractSideEditor):
        model.attach(*editor.attach(model, state))


def _restrained(
    update: Update,
    module: str,
    model: EditableModel,
    restraints: Restraints,
    base_sigma_max: float,
) -> Update:
    """The update after the restraints on updates, in their order."""
    weight_OI = model.edited_weight(module)
    norms = Norms(sigma_max=base_sigma_max, frobenius=model.base_frobenius(module))
    for restraint in restraints.updates:
        update = restraint.restrain(update.to(device=weight_OI.device), weight_OI, norms)
    return update


def next_states(
    step: Step,
    editor: AbstractAnyEditor[Any],
    restraints: Restraints,
    batch: AppliedBatch,
    solve_state: TensorState,
) -> tuple[TensorState, TensorState]:
    """The states of the editor and of the restraint on the solve, after an applied batch."""
    if isinstance(editor, AbstractEditor):
        editor_state = editor.observe(step, batch.plan)
    else:
        assert batch.side is not None  # it was applied
        editor_state = batch.side
    if restraints.solve is not None:
        for problem in batch.problems:
            problem = replace(problem, update=batch.updates[problem.module][0])
            solve_state = restraints.solve.observe(problem, solve_state, step.moments)
    return editor_state, solve_state


def take_step(
    run: Trajectory, number: int, state: RunState
) -> tuple[StepRecord, AppliedBatch, RunState]:
    """The record of one step, its batch and the state after it. The only writes are
    `model.apply`.
    """
    model, requests, clock = run.model, run.batch(number), Stopwatch(run.model.device, run.peaks)
    step = Step(
        model=model,
        requests=requests,
        contexts=state.contexts,
        state=state.editor,
        moments=run.moments,
        pool=run.pool,
        objective=run.restraints.objective,
    )
    batch = apply_batch(
        step,
        run.editor,
        run.restraints,
        base_sigma_max=state.base_sigma_max,
        solve_state=state.solve,
        clock=clock,
    )
    with clock.phase("solve"):
        editor_state, solve_state = state.editor, state.solve
        if batch.nonfinite is None:
            editor_state, solve_state = next_states(
                step, run.editor, run.restraints, batch, state.solve
            )
    for restraint in run.restraints.totals.values():
        if restraint.is_due(number):
            with clock.phase("restrain"):
                restrain_totals(model, restraint, model.totals(), state.base_sigma_max)
    with clock.phase("telemetry"):
        spectra: Mapping[str, Spectrum] = state.spectra
        modules: Mapping[str, Mapping[str, float]] = {}
        side: Mapping[str, float] | None = None
        if run.schedule.has_telemetry(number):
            side = side_figures(model.sides)
            if not model.sides:  # else the weights are what they were
                spectra = {
                    module: extreme_singular_values(model.weight(module), start)
                    for module, start in state.spectra.items()
                }
            modules = describe(model, spectra, batch.updates)
    record = StepRecord(
        step=number,
        requests=tuple(request.id for request in requests),
        seconds=clock.seconds,
        target=batch.plan.summary,
        modules=modules,
        nonfinite=batch.nonfinite or model.nonfinite_module(),
        side=side,
    )
    state = replace(
        state,
        step=number,
        totals=model.totals(),
        editor=editor_state,
        solve=solve_state,
        spectra=spectra,
        rng=generator_states(),
    )
    return record, batch, state


def restrain_totals(
    model: EditableModel,
    restraint: AbstractTotalRestraint,
    totals: Mapping[str, Total],
    base_sigma_max: Mapping[str, float],
) -> None:
    """Writes restrained totals back into the model, so that later edits are made on them."""
    for module, correction in corrections(restraint, totals, base_sigma_max).items():
        model.apply(module, correction)


def describe(
    model: EditableModel,
    spectra: Mapping[str, Spectrum],
    updates: Mapping[str, tuple[Update, float]],
) -> dict[str, Mapping[str, float]]:
    """The telemetry of every edited matrix."""
    records: dict[str, Mapping[str, float]] = {}
    totals = model.totals()  # none for matrices beside which something stands
    for module, spectrum in spectra.items():
        update, rounding_error = updates.get(module, (None, 0.0))
        rows, columns = model.weight(module).shape
        records[module] = module_record(
            model.weight(module),
            spectrum,
            update=update,
            total=totals.get(module, Total((rows, columns))),
            rounding_error=rounding_error,
        )
    return records


def side_figures(sides: Sequence[AbstractBeside]) -> dict[str, float] | None:
    """The telemetry of what stands beside the weights, summed over its parts; None without any."""
    if not sides:
        return None
    parts = [side.figures() for side in sides]
    names = dict.fromkeys(name for part in parts for name in part)
    sums = {name: math.fsum(part.get(name, 0.0) for part in parts) for name in names}
    return sums | {"norm": math.hypot(*(part["norm"] for part in parts))}
