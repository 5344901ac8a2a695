"""A run: loads what the loop needs (`prepare`), and tells the session what its states and results
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from editkit.config.experiment import Experiment
from editkit.datasets.groups import without_split_groups
from editkit.datasets.separators import joined
from editkit.editors.base import AbstractEditor
from editkit.errors import ConfigError, message
from editkit.evaluation.unmatchable import warnings as unmatchable_warnings
from editkit.lazy import torch
from editkit.linalg.spectral import extreme_singular_values
from editkit.records.ledger import LEDGER
from editkit.records.tracker import RunInfo
from editkit.report.figures.run_figures import draw_figures
from editkit.runner.base import AbstractSession, AbstractWork, load_model
from editkit.runner.checkpoint import Checkpoint, RunState
from editkit.runner.context_length import require_room
from editkit.runner.folder import Collapsed
from editkit.runner.inputs import ROUTED, require_same, second_moment
from editkit.runner.loop import Event, run_edits
from editkit.runner.measure import views
from editkit.runner.plan import DIGITS, Collapse, Trajectory, digest_of
from editkit.runner.provenance import (
    describe,
    earlier_sessions,
    peak_memory_bytes,
    read_provenance,
)
from editkit.runner.routed import ELSEWHERE, edits_expert, select_routed
from editkit.runner.self_check import check_editing, check_reading
from editkit.runner.signals import Stopped
from editkit.stats.build import build as build_moments
from editkit.trackers.collecting import collecting
from editkit.types import EvalRecord, StepRecord

if TYPE_CHECKING:
    from editkit.stats.store import Moments

IMPORTED = "imported"  # `statistics` of a record


def run(experiment: Experiment, *, leave_failed: bool = False) -> int:
    """Runs an experiment to its end, or resumes it where it was interrupted. Returns the exit code:
    0 done, 1 collapsed or failed before, 128 + n stopped by signal n.

    Args:
        leave_failed: do nothing if the run failed before, as in a sweep without retry_failed.

    Raises:
        ConfigError: the user can fix it.
        Busy: another process is running it and `when_locked` is "leave".
    """
    return RunSession(experiment).run(leave_failed=leave_failed)


class RunSession(AbstractSession[Experiment, RunState]):
    """The session of a run."""

    def state(self, checkpoint: Checkpoint) -> RunState:
        require_same_ledger(checkpoint, keeps=self.settings.ledger.keep)
        return RunState.from_checkpoint(checkpoint)

    def prepare(
        self, *, should_stop: Callable[[], bool], began_with: Mapping[str, str] | None
    ) -> RunWork:
        experiment = self.settings
        return RunWork(
            experiment, prepare(experiment, should_stop=should_stop, began_with=began_with)
        )

    def already_done(self) -> str:
        recorded = read_provenance(self.settings.folder).get("editor") or {}
        if problems := self.settings.editor.changed_since(recorded):
            raise ConfigError([f"editor.{problem}" for problem in problems])
        if self.settings.ledger.keep and not (self.settings.folder / LEDGER).exists():
            problem = f"{self.settings.folder} is done and kept no ledger"
            fix = "make its edits anew with resume=never"
            raise ConfigError(message("ledger.keep", problem, got=True, fix=fix))
        return f"already done: {self.settings.folder} (resume=never runs it anew)"


class RunWork(AbstractWork[RunState]):
    """A run whose model, second moments and requests are loaded."""

    def __init__(self, experiment: Experiment, trajectory: Trajectory) -> None:
        self.experiment, self.trajectory = experiment, trajectory
        model = trajectory.model  # without comparisons in a resumed run, which said all this before
        family = str(model.network.config.model_type)
        self.plain_paths = model.shortcuts.warnings(model.name, family)
        self.skipped = {} if trajectory.data is None else trajectory.data.skipped
        self.unmatchable: list[str] = []
        if trajectory.contexts is not None:
            self.unmatchable = unmatchable_warnings(
                model.tokenizer, trajectory.requests, experiment.evaluation, chat=model.chat
            )

    def info(self) -> RunInfo:
        experiment = self.experiment
        return RunInfo(
            name=experiment.name,
            folder=experiment.folder,
            edits=experiment.edits,
            batch_size=experiment.schedule.batch_size,
            views=views(self.trajectory),
            config=experiment.config,
        )

    def warnings(self) -> Sequence[str]:
        recipe, warnings = self.experiment.config.get("recipe") or {}, list(self.plain_paths)
        warnings += self.unmatchable
        if elsewhere := self.skipped.get(ELSEWHERE):
            warnings.append(f"{elsewhere} requests were left out: {ELSEWHERE} than model.expert")
        if recipe.get("provenance") == "untuned":
            source = recipe["source"]
            warnings.append(f"the numbers of this editor are not tuned for this model: {source}")
        return [*warnings, *self.experiment.restraints.warnings()]

    def events(self, state: RunState | None) -> Iterator[Event]:
        events = run_edits(self.trajectory, state)
        return map(_on_imported, events) if self.trajectory.moments.imported else events

    def ledger(self) -> dict[str, Any] | None:
        experiment, model = self.experiment, self.trajectory.model
        if not experiment.ledger.keep:
            return None
        config = experiment.config
        return {
            "kind": "run",
            "model": config["model"],
            "fingerprint": model.fingerprint,
            "modules": {name: list(total.shape) for name, total in model.totals().items()},
            "editor": config["editor"],
            "restraint": config.get("restraint") or {},
            "dataset": {"name": config["dataset"].get("name"), "digest": experiment.data.digest},
        }

    def checkpoint(self, state: RunState, record_bytes: Mapping[str, int]) -> Checkpoint:
        return state.checkpoint(record_bytes)

    def reached(self, state: RunState) -> bool:
        return state.step == self.trajectory.schedule.last_step

    def collapsed(self, error: Exception) -> Collapsed | None:
        if not isinstance(error, Collapse):
            return None
        return Collapsed(kind="collapse", step=error.record.step)

    def provenance(self) -> dict[str, Any]:
        experiment, trajectory = self.experiment, self.trajectory
        shared = describe(trajectory.model, trajectory.data or experiment.data)
        return shared | {
            "requests": [request.id for request in trajectory.requests],
            "evaluated": trajectory.evaluated(),
            "statistics": trajectory.moments.digests,
            **_imported(trajectory.moments),
            "shortcuts": trajectory.model.shortcuts.report(),
            "editor": dict(experiment.editor.provenance()),
            "seed": experiment.seed,
            "earlier_sessions": earlier_sessions(experiment.folder, shared),
        }

    def measured(self) -> dict[str, Any]:
        peaks = self.trajectory.peaks.bytes
        return {
            "peak_memory_bytes": peak_memory_bytes(self.trajectory.model.device, peaks),
            "peak_memory_bytes_by_phase": peaks,  # of this session
        }

    def draw(self) -> None:
        draw_figures(self.experiment.folder)


def require_same_ledger(checkpoint: Checkpoint, *, keeps: bool) -> None:
    """Raises ConfigError if a resumed run would keep a part of a ledger."""
    kept = LEDGER in checkpoint.record_bytes
    if checkpoint.record_bytes and kept != keeps:
        problem = f"the run began {'with' if kept else 'without'} a ledger"
        fix = f"resume it with ledger.keep={str(kept).lower()}, or start anew with resume=never"
        raise ConfigError(message("ledger.keep", problem, got=keeps, expected=str(kept), fix=fix))


def _on_imported(event: Event) -> Event:
    """The event with the mark of edits that rest on imported second moments."""
    if isinstance(event, StepRecord | EvalRecord):
        return replace(event, statistics=IMPORTED)
    return event


def _imported(moments: Moments) -> dict[str, Any]:
    """The entry of the provenance about imported second moments; empty if there are none."""
    if not moments.imported:
        return {}
    of_module = moments.by_module
    return {
        "statistics_imported": {
            module: {"file": file, "digest": of_module[module].source_digest}
            | {"keys": of_module[module].num_tokens}
            for module, file in moments.imported.items()
        }
    }


def prepare(
    experiment: Experiment,
    *,
    should_stop: Callable[[], bool],
    began_with: Mapping[str, str] | None = None,
) -> Trajectory:
    """Loads the model, its second moments and the requests, and makes the checks that need them.

    Args:
        began_with: the inputs of the run that is resumed; None for a new run.

    Raises:
        ConfigError: an input is not the one that the run began with, which is raised as soon as
            the input is known; or the user can fix something else.
        Stopped: it was to stop during the computation of second moments. Their sums so far are
            saved.
    """
    runtime, editor, restraints = experiment.runtime, experiment.editor, experiment.restraints
    loaded = load_model(
        experiment,
        began_with,
        should_stop=should_stop,
        edits=experiment.edits if experiment.model.expert is None else None,
    )
    model, data, peaks = loaded.model, loaded.data, loaded.peaks
    inputs = dict(loaded.inputs)
    is_selected = data.known_only
    if edits_expert(model, editor):
        edits, is_selected = experiment.edits, True
        data = select_routed(model, editor, data, edits=edits, should_stop=should_stop)
        routed = {ROUTED: digest_of(data.requests[:edits])}
        require_same(began_with, routed, source="what the router chooses")
        inputs |= routed
    if is_selected:  # what is checked without the model where all requests are known before
        if problems := editor.check_requests(data, data.requests[: experiment.edits]):
            raise ConfigError([f"editor.{problem}" for problem in problems])
        if experiment.rollback:
            data = without_split_groups(data, batch_size=experiment.schedule.batch_size)
    requests = data.requests[: experiment.edits]
    edited = {request.id for request in requests}
    pool = tuple(each for each in experiment.data.requests if each.id not in edited)
    contexts = None
    if began_with is None:  # a resumed run has its contexts, and passed these checks when it began
        if not data.known_only:  # its facts were selected after this check
            check_reading(model, joined(requests[0].probe()))
        contexts = editor.contexts(model, torch.Generator().manual_seed(experiment.seed))
        before = editor.context_tokens(model, requests, pool)
        probes = experiment.evaluation.probes(requests)
        require_room(model, requests, contexts, probes, before=before)
        check_editing(model, editor, requests[0])
    modules = editor.modules(model)
    if isinstance(editor, AbstractEditor):
        model.edit(modules, base_device=None if runtime.base == "device" else runtime.base)
    if restraints.totals:  # before second moments, which may take hours; needs only the weights
        base_sigma_max = {
            module: extreme_singular_values(model.weight(module), None).sigma_max
            for module in modules
        }
        if problems := [
            f"restraint.{name}.{problem}"
            for name, restraint in restraints.totals.items()
            for problem in restraint.check(base_sigma_max)
        ]:
            raise ConfigError(problems)
    with peaks.phase("statistics"), collecting() as shown:

        def progress(done: int, of: int) -> None:
            shown.progress(done, of)
            if should_stop():
                raise Stopped

        moments = build_moments(
            model,
            editor.moment_modules(model),
            experiment.stats,
            place=runtime.statistics,
            announce=shown.announce,
            progress=progress,
        ).solved_in(experiment.solve.dtype)
    statistics = {second_moment(module): digest for module, digest in moments.digests.items()}
    require_same(began_with, statistics, source=experiment.stats.folder)
    evaluators = {
        name: evaluator.prepare(model) for name, evaluator in experiment.evaluators.items()
    }
    measuring = {
        name: digest
        for evaluator in evaluators.values()
        for name, digest in evaluator.inputs(model).items()
    }
    require_same(began_with, measuring, source="its data")
    return Trajectory(
        model=model,
        editor=editor,
        restraints=restraints,
        requests=requests,
        evaluators=evaluators,
        schedule=experiment.schedule,
        moments=moments,
        seed=experiment.seed,
        on_collapse=experiment.on_collapse,
        timings=experiment.measuring.timings,
        rollback=experiment.rollback,
        max_requests=experiment.measuring.max_requests,
        block_size=experiment.evaluation.block_size,
        dataset=data.digest[:DIGITS],
        data=data,
        pool=pool,
        contexts=contexts,
        inputs={**inputs, **statistics, **measuring},
        should_stop=should_stop,
        peaks=peaks,
        ledger=experiment.ledger,
    )
