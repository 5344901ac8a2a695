"""A training and its files: those of a run (config, provenance, steps, evals, state, DONE or
FAILED), and the hypernetwork.

Cut off, the same command goes on from the last checkpoint to the same bits.
"""

from __future__ import annotations

import json
import time
import traceback
from typing import Any

import yaml

from editkit.files import write_atomically
from editkit.hypernet.learner import Diverged, Learning, LearningState
from editkit.hypernet.network import Hypernetwork, new_hypernetwork
from editkit.hypernet.store import FILE, save_hypernetwork
from editkit.lazy import torch
from editkit.model.editable import EditableModel
from editkit.model.load import require_device
from editkit.records.tracker import RunInfo, Status
from editkit.records.writer import EVALS, STEPS, RecordFiles
from editkit.resources.estimate import free_bytes, require_fit
from editkit.runner.checkpoint import read_pointer
from editkit.runner.inputs import MODEL, of_dataset, require_same
from editkit.runner.lock import locked
from editkit.runner.provenance import (
    PROVENANCE,
    added_up,
    environment,
    peak_memory_bytes,
    read_provenance,
    recorded_dataset,
)
from editkit.runner.session import (
    CONFIG,
    DONE,
    FAILED,
    FAILURE,
    OK,
    clear,
    save_failure,
    steps_after,
)
from editkit.runner.signals import Received, stop_signals
from editkit.trackers.guarded import Guarded
from editkit.trackers.logged import warnings_shown
from editkit.training.build import Training
from editkit.training.figures import draw_training
from editkit.training.state import load_learning, save_learning, saved_inputs
from editkit.types import StepRecord


def train(job: Training) -> int:
    """Trains to the end, or on from where it was cut off; the exit code, as a run's. Raises
    ConfigError for what the user can mend.
    """
    folder, warn = job.folder, job.tracker.warning
    with locked(
        folder,
        may_wait=job.settings.when_locked == "wait",
        waiting=lambda holder: warn(f"waiting for {holder}: {folder}"),
    ):
        if job.settings.resume != "never" and (folder / DONE).exists():
            require_same(
                recorded_dataset(folder), of_dataset(job.data.provenance()), source=job.data.origin
            )
            warn(f"already trained: {folder / FILE} (resume=never trains anew)")
            return OK
        with stop_signals() as received, warnings_shown(job.tracker):
            return _execute(job, received)


def _execute(job: Training, received: Received) -> int:
    folder, started, is_anew = job.folder, time.time(), job.settings.resume == "never"
    if job.runtime.threads:
        torch.set_num_threads(job.runtime.threads)
    pointer, state = (
        (None, None)
        if is_anew
        else (read_pointer(folder / "state"), load_learning(folder / "state"))
    )
    began_with, inputs = (
        saved_inputs(folder / "state") if pointer else None,
        of_dataset(job.data.provenance()),
    )
    require_same(began_with, inputs, source=job.data.origin)
    require_device(job.runtime.device)
    require_fit(job.demand, training=job.editor, free_bytes=free_bytes(job.demand))
    model = job.model.load(job.runtime.device)
    inputs[MODEL] = model.fingerprint
    require_same(began_with, {MODEL: model.fingerprint}, source=job.model.id)
    shapes = {
        module: (model.weight(module).shape[0], model.weight(module).shape[1])
        for module in job.editor.modules(model)
    }
    network = new_hypernetwork(shapes, job.editor.network, seed=job.settings.seed)
    learning = Learning(
        model=model,
        network=network,
        split=job.split,
        options=job.editor.train,
        seed=job.settings.seed,
        checkpoint_every=job.settings.checkpoint.every,
        should_stop=lambda: received.number is not None,
    )
    if is_anew:  # not before all is there that the training needs
        clear(folder)
        (folder / FILE).unlink(missing_ok=True)
    num_lost = steps_after(folder / STEPS, pointer["record_bytes"].get(STEPS, 0)) if pointer else 0
    records = RecordFiles(folder, pointer["record_bytes"] if pointer else {})
    write_atomically(folder / CONFIG, yaml.safe_dump(dict(job.config), sort_keys=False).encode())
    (folder / FAILED).unlink(missing_ok=True)
    tracker = Guarded(job.tracker)
    tracker.open(_info(job, resumed_at=state.step if state else 0))
    status: Status = "failed"
    last, events = state.outcome() if state else None, learning.run(state)
    del state  # its tensors are several times the network's size
    try:
        for event in events:
            if isinstance(event, LearningState):
                save_learning(event, folder / "state", records.sync(), inputs=inputs)
                last = event.outcome()
                del event
                continue
            records.append(event)
            tracker.step(event) if isinstance(event, StepRecord) else tracker.evaluation(event)
        assert last is not None
        options = job.editor.train
        is_complete = last.step >= options.steps or last.step - last.best_step >= options.patience
        status = "done" if is_complete else "interrupted"
    except Diverged as diverged:
        status = "collapsed"
        save_failure(
            folder, {"kind": "diverged", "error": str(diverged), "step": diverged.record.step}
        )
        tracker.warning(f"the loss is not finite: {diverged}")
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
        if (
            last is not None and last.best
        ):  # what was found so far can be edited with, also where training goes on later
            _save(job, model, network, last)
        _save_provenance(job, model, seconds=time.time() - started, num_lost=num_lost)
        if status == "done":
            write_atomically(folder / DONE, b"")
        try:
            draw_training(folder)
        except Exception as error:  # the figure can be drawn again, the training cannot
            tracker.warning(f"no figure: {type(error).__name__}: {error}")
        tracker.close(status)
    return {"done": OK, "collapsed": FAILURE}.get(status, 128 + (received.number or 0))


def _save(job: Training, model: EditableModel, network: Hypernetwork, state: LearningState) -> None:
    """Writes the best network so far, with what its measurements were."""
    facts: dict[str, Any] = {
        "steps": state.step,
        "best_step": state.best_step,
        "validation_loss": state.best_loss,
        "held_apart": job.split.num_held_apart,
        "train": {
            key: value for key, value in job.config["editor"].items() if key in ("layers", "train")
        },
        "dataset": job.data.label,
        "seed": job.settings.seed,
        "validation": _at(job, state.best_step),
    }
    save_hypernetwork(
        job.folder / FILE,
        state.best_of(network),
        model=model.name,
        fingerprint=model.fingerprint,
        dataset=job.data.digest,
        trained=job.split.seen,
        facts=facts,
    )


def _at(job: Training, step: int) -> dict[str, float | None]:
    """What validation measured at a step."""
    lines = (json.loads(line) for line in (job.folder / EVALS).read_bytes().splitlines())
    return {
        f"{line['kind']}/{line['metric']}": line.get("value")
        for line in lines
        if line["step"] == step
    }


def _info(job: Training, *, resumed_at: int) -> RunInfo:
    return RunInfo(
        name=job.name,
        folder=job.folder,
        edits=job.editor.train.steps,
        batch_size=1,
        views=("unrestrained",),
        config=job.config,
        resumed_at=resumed_at,
        unit="steps",
    )


def _save_provenance(job: Training, model: EditableModel, *, seconds: float, num_lost: int) -> None:
    total = added_up(read_provenance(job.folder), seconds=seconds, num_lost=num_lost)
    provenance = (
        _describe(job, model) | total | {"peak_memory_bytes": peak_memory_bytes(model.device)}
    )
    write_atomically(job.folder / PROVENANCE, json.dumps(provenance, indent=1).encode())


def _describe(job: Training, model: EditableModel) -> dict[str, Any]:
    return environment(model.device) | {
        "model": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
        },
        "dataset": job.data.provenance(),
        "split": {
            "held_apart": job.split.num_held_apart,
            "train": len(job.split.train),
            "validation": [request.id for request in job.split.validation],
            "left_out": job.split.left_out,
        },
        "seed": job.settings.seed,
    }
