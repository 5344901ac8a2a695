"""One run from its folder's point of view: lock it, load what the runner needs, write down what the
runner yields, close it.

Everything that the runner must not do happens here: files, signals, trackers, wall time.
"""

from __future__ import annotations

import json
import shutil
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from editkit.config.experiment import Experiment
from editkit.errors import ConfigError
from editkit.files import write_atomically
from editkit.lazy import torch
from editkit.linalg.spectral import extreme_singular_values
from editkit.model.load import require_device
from editkit.records.tracker import AbstractTracker, RunInfo, Status
from editkit.records.writer import EVALS, STEPS, RecordFiles, save_samples
from editkit.report.figures.run_figures import draw_figures
from editkit.resources.estimate import free_bytes, require_fit
from editkit.resources.peak_memory import Peaks
from editkit.runner.checkpoint import LATEST, RunState, load_state, read_pointer, save_state
from editkit.runner.context_length import require_room
from editkit.runner.inputs import MODEL, of_dataset, require_same, second_moment
from editkit.runner.lock import locked
from editkit.runner.loop import Event, run_edits
from editkit.runner.measure import views
from editkit.runner.plan import DIGITS, Collapse, Trajectory
from editkit.runner.provenance import PROVENANCE, describe, recorded_dataset, save_provenance
from editkit.runner.signals import Received, Stopped, stop_signals
from editkit.stats.build import build as build_moments
from editkit.trackers.collecting import collecting
from editkit.trackers.guarded import Guarded
from editkit.trackers.logged import warnings_shown
from editkit.types import SampleRecord, StepRecord

DONE, FAILED, CONFIG = "DONE", "FAILED.json", "config.yaml"
OK, FAILURE = 0, 1  # exit codes; 2 is a ConfigError, 128 + n a stop by signal n


def run(experiment: Experiment, *, leave_failed: bool = False) -> int:
    """Runs an experiment to its end, or on from where it was cut off; the exit code. Raises
    ConfigError for what the user can mend.

    A run that another process has is waited for, or raises Busy, as `when_locked` says.

    Args:
        leave_failed: do nothing where the run failed before, as a sweep does unless it is told to
        try again.
    """
    folder, warn = experiment.folder, experiment.tracker.warning
    with locked(
        folder,
        may_wait=experiment.when_locked == "wait",
        waiting=lambda holder: warn(f"waiting for {holder}: {folder}"),
    ):
        if experiment.resume != "never":
            if (folder / DONE).exists():
                require_same(
                    recorded_dataset(folder),
                    of_dataset(experiment.data.provenance()),
                    source=experiment.data.origin,
                )
                warn(f"already done: {folder} (resume=never runs it anew)")
                return OK
            if leave_failed and (folder / FAILED).exists():
                warn(f"failed before, and left so: {folder} (retry_failed=true tries again)")
                return FAILURE
        with stop_signals() as received, warnings_shown(experiment.tracker):
            return execute(experiment, received)


def execute(experiment: Experiment, received: Received) -> int:
    """The run itself, between its first and its last file."""
    folder, started, is_anew = experiment.folder, time.time(), experiment.resume == "never"
    pointer = None if is_anew else read_pointer(folder / "state")
    state = load_state(folder / "state") if pointer else None
    try:
        job = prepare(
            experiment,
            should_stop=lambda: received.number is not None,
            began_with=state.inputs if state else None,
        )
    except Stopped:
        return 128 + (received.number or 0)
    if is_anew:
        clear(
            folder
            # not before all is there that the run needs: what fails until here costs no earlier
            # result
        )
    num_lost = steps_after(folder / STEPS, pointer["record_bytes"].get(STEPS, 0)) if pointer else 0
    records = RecordFiles(folder, pointer["record_bytes"] if pointer else {})
    write_atomically(folder / CONFIG, yaml.safe_dump(experiment.config, sort_keys=False).encode())
    (folder / FAILED).unlink(missing_ok=True)
    tracker = Guarded(experiment.tracker)
    tracker.open(run_info(experiment, job, resumed_at=state.step if state else 0))
    recipe = experiment.config.get("recipe") or {}
    if recipe.get("provenance") == "untuned":
        tracker.warning(
            f"the numbers of this editor are not tuned for this model: {recipe['source']}"
        )
    status: Status = "failed"
    try:
        step = state.step if state else -1
        for event in run_edits(job, state):
            handle(event, folder, records, tracker)
            step = event.step
        # Whatever stops the runner, the last thing that it yields is the state at that point.
        status = "done" if step == job.schedule.last_step else "interrupted"
    except Collapse as collapse:
        status = "collapsed"
        save_failure(
            folder, {"kind": "collapse", "error": str(collapse), "step": collapse.record.step}
        )
    except Exception as error:
        save_failure(
            folder,
            {
                "kind": "error",
                "error": f"{type(error).__name__}: {error}",
                "traceback": traceback.format_exc(),
            },
        )
        raise
    finally:
        records.close()
        save_provenance(
            folder,
            describe(experiment, job),
            seconds=time.time() - started,
            job=job,
            num_lost=num_lost,
        )
        if status == "done":
            write_atomically(folder / DONE, b"")
        try:
            draw_figures(folder)
        except Exception as error:  # the figures can be drawn again, the run cannot
            tracker.warning(f"no figures: {type(error).__name__}: {error}")
        tracker.close(status)
    return {"done": OK, "collapsed": FAILURE}.get(status, 128 + (received.number or 0))


def save_failure(folder: Path, failure: dict[str, Any]) -> None:
    """FAILED.json: the error, and from which state the same command goes on."""
    saved = read_pointer(folder / "state")
    where = (
        {"state": f"state/{saved['file']}", "saved_step": saved["step"]}
        if saved
        else {"state": None, "saved_step": None}
    )
    write_atomically(folder / FAILED, json.dumps(failure | where, indent=1).encode())


def prepare(
    experiment: Experiment,
    *,
    should_stop: Callable[[], bool],
    began_with: Mapping[str, str] | None = None,
) -> Trajectory:
    """Loads the model, its second moments and the requests, and checks what could not be checked
    without them.

    Args:
        began_with: the inputs of the run that shall go on; others raise ConfigError, each as soon
        as it is known. None: a new run.

    Raises Stopped where it was to stop while second moments were computed: what was done of them is
    saved.
    """
    torch.set_num_threads(experiment.runtime.threads) if experiment.runtime.threads else None
    runtime, editor, restraints = experiment.runtime, experiment.editor, experiment.restraints
    data = of_dataset(experiment.data.provenance())
    require_same(began_with, data, source=experiment.data.origin)
    require_device(runtime.device)
    require_fit(experiment.demand, free_bytes=free_bytes(experiment.demand))
    peaks = Peaks(runtime.device)
    with peaks.phase("load"):
        model = experiment.model.load(runtime.device)
    network = {MODEL: model.fingerprint}
    require_same(began_with, network, source=experiment.model.id)
    requests = experiment.data.requests[: experiment.edits]
    contexts = None
    if (
        began_with is None
    ):  # one that goes on has its contexts, and was asked for room when it began
        contexts = editor.contexts(model, torch.Generator().manual_seed(experiment.seed))
        require_room(model, requests, contexts, experiment.evaluation.probes(requests))
    modules = editor.modules(model)
    model.edit(modules, base_device=None if runtime.base == "device" else runtime.base)
    if (
        restraints.totals
    ):  # before second moments, which may take hours: this needs only the weights
        base_sigma_max = {
            module: extreme_singular_values(model.weight(module), None).sigma_max
            for module in modules
        }
        found = {
            name: restraint.check(base_sigma_max) for name, restraint in restraints.totals.items()
        }
        if problems := [
            f"restraint.{name}.{problem}" for name, each in found.items() for problem in each
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
    require_same(began_with, statistics, source=f"what is in {experiment.stats.folder}")
    measuring = {
        name: digest
        for each in experiment.evaluators.values()
        for name, digest in each.inputs(model).items()
    }
    require_same(began_with, measuring, source="its data")
    return Trajectory(
        model=model,
        editor=editor,
        restraints=restraints,
        requests=requests,
        evaluators=experiment.evaluators,
        schedule=experiment.schedule,
        moments=moments,
        seed=experiment.seed,
        on_collapse=experiment.on_collapse,
        timings=experiment.measuring.timings,
        rollback=experiment.rollback,
        max_requests=experiment.measuring.max_requests,
        block_size=experiment.evaluation.block_size,
        dataset=experiment.data.digest[:DIGITS],
        contexts=contexts,
        inputs=data | network | statistics | measuring,
        should_stop=should_stop,
        peaks=peaks,
    )


def handle(event: Event, folder: Path, records: RecordFiles, tracker: AbstractTracker) -> None:
    """Writes one event down, and shows it."""
    if isinstance(event, RunState):
        save_state(event, folder / "state", records.sync())
        return
    if isinstance(event, SampleRecord):
        save_samples(event, folder / "samples")
        tracker.samples(event)
        return
    records.append(event)
    if isinstance(event, StepRecord):
        tracker.step(event)
    else:
        tracker.evaluation(event)


def run_info(experiment: Experiment, job: Trajectory, *, resumed_at: int) -> RunInfo:
    return RunInfo(
        name=experiment.name,
        folder=experiment.folder,
        edits=experiment.edits,
        batch_size=experiment.schedule.batch_size,
        views=views(job),
        config=experiment.config,
        resumed_at=resumed_at,
    )


def steps_after(path: Path, num_bytes: int) -> int:
    """How many steps were recorded after the checkpoint: a run that goes on from there makes them
    again.
    """
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(num_bytes)
        return file.read().count(b"\n")


def clear(folder: Path) -> None:
    """Removes what an earlier run of this cell wrote.

    In this order: cut off at any point it leaves a run that goes on to what it was, or one that has
    not begun; never half of a done one.
    """
    for name in (DONE, FAILED, f"state/{LATEST}", STEPS, EVALS, PROVENANCE, CONFIG):
        (folder / name).unlink(missing_ok=True)
    for name in ("state", "figures", "samples", "wandb"):
        shutil.rmtree(folder / name, ignore_errors=True)
