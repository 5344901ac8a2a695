"""The loop: it applies batches of edits one after another and yields records. It neither logs nor
writes; the session does.

It yields a `StepRecord` after every step, its `LedgerRecord` if a ledger is kept, `EvalRecord`s and
`RunState` if a checkpoint is due. Resuming from a yielded state gives the same records and the same
bits as an uninterrupted run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from editkit.editors.base import AbstractEditor
from editkit.lazy import torch
from editkit.linalg.spectral import extreme_singular_values
from editkit.model.shortcuts import Shortcuts
from editkit.records.ledger import LedgerRecord
from editkit.runner.checkpoint import RunState, generator_states, restore_generators
from editkit.runner.measure import evaluate, measure, measure_batch, measure_weights, note
from editkit.runner.plan import Collapse, Trajectory
from editkit.runner.step import (
    AppliedBatch,
    attach,
    describe,
    first_states,
    restrain_totals,
    take_step,
)
from editkit.types import EvalRecord, SampleRecord, StepRecord

Event = StepRecord | EvalRecord | SampleRecord | LedgerRecord | RunState


def run_edits(run: Trajectory, state: RunState | None = None) -> Iterator[Event]:
    """Edits from the beginning, or resumes from `state`.

    Raises:
        Collapse: a number is not finite and the run stops there. The state was yielded before.
    """
    if isinstance(run.editor, AbstractEditor):
        run.model.edit(run.editor.modules(run.model))
    if state is None:
        state = origin = begin(run)
        yield StepRecord(step=0, modules=describe(run.model, state.spectra, {}))
        if run.schedule.is_milestone(0):
            yield from evaluate(run, state)
        yield state
    else:
        run.model.shortcuts = Shortcuts.from_report(state.shortcuts)
        origin = unedited(run, state) if run.rollback else state
        run.model.restore(state.totals)
        attach(run.model, run.editor, state.editor)
        restore_generators(state.rng)
    for step in range(state.step + 1, run.schedule.last_step + 1):
        before = state
        if run.rollback:
            run.model.restore(origin.totals)
            attach(run.model, run.editor, origin.editor)
            before = replace(state, totals=origin.totals, editor=origin.editor, solve=origin.solve)
        record, batch, state_after = take_step(run, step, before)
        if record.nonfinite and run.on_collapse == "stop":
            yield state  # the last finite one: resuming from it meets the same collapse again
            yield record
            raise Collapse(record)
        state = note(run, state_after) if run.notes_every_step else state_after
        yield record
        if run.ledger.keep:
            yield block_of(run, step, batch)
        if run.rollback and run.schedule.batch_size > 1:
            yield from measure_batch(run, state)
        if run.schedule.is_measured(step):
            yield from evaluate(run, state)
        if step == run.schedule.last_step:
            unrestrained = state.totals
            for name, restraint in run.restraints.totals.items():
                if restraint.apply_at == "end":
                    totals = run.model.totals()
                    restrain_totals(run.model, restraint, totals, state.base_sigma_max)
                    state = replace(state, totals=run.model.totals(), before_end=unrestrained)
                    yield from measure(run, state, name)
                    yield from measure_weights(run, state, name)
        stopping = run.should_stop()  # asked once: the answer may change while the state is written
        if run.schedule.has_checkpoint(step) or stopping:
            yield state
        if stopping:
            return


def block_of(run: Trajectory, step: int, batch: AppliedBatch) -> LedgerRecord:
    """The entry of a step in the ledger."""
    totals = run.restraints.totals.items()
    is_last = step == run.schedule.last_step
    return LedgerRecord(
        step=step,
        requests=run.batch(step),
        updates={module: update for module, (update, _) in batch.updates.items()},
        restrained=tuple(name for name, restraint in totals if restraint.is_due(step)),
        ends=tuple(name for name, each in totals if is_last and each.apply_at == "end"),
        author=run.ledger.author,
        note=run.ledger.note,
    )


def begin(run: Trajectory) -> RunState:
    """The state of the unedited model: contexts, baselines, spectra. The model is only read."""
    torch.manual_seed(run.seed)  # for editors that draw from the global generators
    generator = torch.Generator().manual_seed(run.seed)
    spectra = {
        module: extreme_singular_values(run.model.weight(module), None)
        for module in run.editor.modules(run.model)
    }
    contexts = run.contexts
    if contexts is None:
        contexts = run.editor.contexts(run.model, generator)
    editor, solve = first_states(run.model, run.editor, run.restraints, run.moments)
    return RunState(
        step=0,
        totals=run.model.totals(),
        contexts=contexts,
        editor=editor,
        solve=solve,
        baselines={
            name: evaluator.baseline(run.model, run.ever_measured())
            for name, evaluator in run.evaluators.items()
        },
        spectra=spectra,
        base_sigma_max={module: spectrum.sigma_max for module, spectrum in spectra.items()},
        rng=generator_states(),
        inputs=run.inputs,
        shortcuts=run.model.shortcuts.report(),
    )


def unedited(run: Trajectory, state: RunState) -> RunState:
    """The state with all edits taken back, of a model that has none yet."""
    editor, solve = first_states(run.model, run.editor, run.restraints, run.moments)
    return replace(state, totals=run.model.totals(), editor=editor, solve=solve)
