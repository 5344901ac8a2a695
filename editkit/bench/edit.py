"""Timing of edits: the reference implementation on the current weights, then a step of editkit,
which writes the weights.

Shape letters: O d_out, I d_in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from editkit.bench.base import Comparison, Cost, Options, PairedTiming, relative_difference, timed
from editkit.bench.profiling import profiled
from editkit.bench.reference import Edit
from editkit.bench.synthetic import moments_for, requests_for
from editkit.config.schedule import Schedule
from editkit.editors.base import AbstractEditor
from editkit.restraints.base import AbstractSolveRestraint, Restraints
from editkit.runner.checkpoint import RunState
from editkit.runner.loop import begin
from editkit.runner.plan import Trajectory
from editkit.runner.step import take_step
from editkit.targets.settings import TargetSettings
from editkit.types import StepRecord

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

STEPS = 20
SEED = 0


def target_settings() -> TargetSettings:
    """20 losses without early stop. The learning rate is relative to the activations, which random
    weights make small.
    """
    return TargetSettings(
        steps=STEPS,
        lr=0.1,
        lr_unit="relative",
        weight_decay=1e-3,
        clamp=4.0,
        kl_factor=0.0625,
        kl_position="subject_last",
        stop_loss=0.0,
        exact=False,
    )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A run and its state."""

    run: Trajectory
    state: RunState

    def after(self, state: RunState) -> Bench:
        return Bench(run=self.run, state=state)

    def step(self, number: int) -> tuple[StepRecord, RunState]:
        record, _, state = take_step(self.run, number, self.state)
        return record, state


def bench_of(
    model: EditableModel,
    editor: AbstractEditor[Any],
    options: Options,
    *,
    solve: AbstractSolveRestraint | None = None,
    batch_size: int = 1,
) -> Bench:
    """A run of the editor on synthetic requests and second moments, before its first step."""
    modules = editor.modules(model)
    edits = batch_size * (options.repeats + 2)  # one to warm up, one to profile
    run = Trajectory(
        model=model,
        editor=editor,
        restraints=Restraints(solve=solve),
        requests=requests_for(options.shape, edits),
        evaluators={},
        schedule=Schedule(
            edits=edits,
            batch_size=batch_size,
            milestones=(),
            telemetry_every=1,
            checkpoint_every=edits,
        ),
        moments=moments_for(model, modules),
        seed=SEED,
    )
    model.edit(modules)
    return Bench(run=run, state=begin(run))


def edit_cost(bench: Bench, number: int) -> Cost:
    """The cost of one edit without its telemetry."""
    cost, (record, _) = timed(lambda: bench.step(number), str(bench.run.model.device))
    return cost.without(record.seconds["telemetry"] / cost.seconds)


def compare_edits(bench: Bench, reference: Edit, options: Options) -> tuple[Comparison, Bench]:
    """Times `options.repeats` edits of both implementations. The relative difference is the largest
    of all updates. Also returns the run after these edits.
    """
    run, timing, phases, difference = bench.run, PairedTiming(device=options.device), [], 0.0
    warm_up = int(options.device_type == "cuda")  # kernels are loaded and chosen at their first use
    last = warm_up + options.repeats
    for number in range(1, last + 1):
        updates = timing.run("plain", partial(reference, run.batch(number), bench.state.contexts))
        before = {module: run.model.total(module).dense() for module in updates}
        record, state = timing.run("ours", partial(bench.step, number))
        timing.discount("ours", record.seconds["telemetry"])  # the reference has none
        phases.append(record.seconds)
        if number == warm_up:
            timing.forget()
            phases.clear()
        bench = bench.after(state)
        for module, update_OI in updates.items():
            written_OI = run.model.total(module).dense().to(update_OI.device) - before[module].to(
                update_OI.device
            )
            difference = max(difference, relative_difference(update_OI, written_OI))
    mean_phases = {
        name: sum(seconds[name] for seconds in phases) / len(phases) for name in phases[0]
    }
    more: dict[str, Any] = {
        "steps": STEPS,
        "contexts": len(bench.state.contexts),
        "phases_s": mean_phases,
        "telemetry_share": mean_phases["telemetry"] / sum(mean_phases.values()),
    }
    if options.profile:
        more["profile"] = profiled(lambda: bench.step(last + 1), options.device)
    return timing.comparison(relative_difference=difference, **more), bench
