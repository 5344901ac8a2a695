"""A session: what one process does in the folder of a run or a training, from taking the lock to
writing the last file.

`AbstractSession` holds the steps and their order, which kill safety depends on. A run
(`editkit.runner.session`) and a training (`editkit.training.session`) supply what differs.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar, final

import yaml

from editkit.datasets.base import LoadedDataset
from editkit.datasets.separators import joined
from editkit.files import out_of_space_number, write_atomically
from editkit.lazy import torch
from editkit.model.load import ModelConfig, require_device
from editkit.records.ledger import LedgerRecord
from editkit.records.tracker import AbstractTracker, RunInfo, Status
from editkit.records.writer import STEPS, RecordFiles, save_samples
from editkit.resources.estimate import free_bytes, require_fit
from editkit.resources.footprint import Demand, Trained
from editkit.resources.peak_memory import Peaks
from editkit.resources.runtime import Runtime
from editkit.runner.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from editkit.runner.done import require_unchanged
from editkit.runner.folder import (
    CONFIG,
    DONE,
    FAILED,
    STATE,
    Collapsed,
    clear,
    out_of_space,
    remove_unfinished,
    save_failure,
    steps_after,
)
from editkit.runner.inputs import CHAT, KNOWN, MODEL, of_dataset, require_same
from editkit.runner.known import select_known
from editkit.runner.lock import locked
from editkit.runner.plan import digest_of
from editkit.runner.provenance import save_provenance
from editkit.runner.self_check import check_reading
from editkit.runner.signals import Received, Stopped, stop_signals
from editkit.trackers.guarded import Guarded
from editkit.trackers.logged import warnings_shown
from editkit.types import EvalRecord, SampleRecord, StepRecord

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

OK, FAILURE = 0, 1  # exit codes; 2 is a ConfigError
SIGNALLED = 128  # plus the number of the signal that stopped the session


class Steps(Protocol):
    """The state of a run or training after one of its steps."""

    @property
    def step(self) -> int: ...


class Settings(Protocol):
    """The settings that a run and a training have in common."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> LoadedDataset: ...
    @property
    def tracker(self) -> AbstractTracker: ...
    @property
    def runtime(self) -> Runtime: ...
    @property
    def demand(self) -> Demand: ...
    @property
    def folder(self) -> Path: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def resume(self) -> Literal["auto", "never"]: ...
    @property
    def when_locked(self) -> Literal["leave", "wait"]: ...


SettingsT = TypeVar("SettingsT", bound=Settings)
StateT = TypeVar("StateT", bound=Steps)


class AbstractWork(abc.ABC, Generic[StateT]):
    """A run or training after everything that it needs was loaded and checked."""

    @abc.abstractmethod
    def info(self) -> RunInfo:
        """The tracker's description of the work; the session adds the step that it resumes at."""

    def warnings(self) -> Sequence[str]:
        """Warnings for the tracker before the first step."""
        return ()

    @abc.abstractmethod
    def events(
        self, state: StateT | None
    ) -> Iterator[StepRecord | EvalRecord | SampleRecord | LedgerRecord | StateT]:
        """Works from the beginning (`state` None) or from a checkpoint. Yields records in the order
        in which they are written, and a state where a checkpoint is due. The last event is the
        state in which the work ended.
        """

    @abc.abstractmethod
    def checkpoint(self, state: StateT, record_bytes: Mapping[str, int]) -> Checkpoint:
        """The content of a checkpoint."""

    @abc.abstractmethod
    def reached(self, state: StateT) -> bool:
        """Called with every state that a checkpoint holds: the one that the work resumes from and
        those that it yields. Returns whether the work is complete with it.
        """

    @abc.abstractmethod
    def collapsed(self, error: Exception) -> Collapsed | None:
        """The number that is not finite, if that is what an error reports; None for every other
        error.
        """

    def ledger(self) -> Mapping[str, Any] | None:
        """The head of the ledger that the work keeps; None if it keeps none."""
        return None

    def save_results(self) -> None:
        """Writes files besides records and checkpoints. Also called after a stop or an error."""

    @abc.abstractmethod
    def provenance(self) -> dict[str, Any]:
        """The content of provenance.json without this session's time."""

    @abc.abstractmethod
    def measured(self) -> dict[str, Any]:
        """The end of provenance.json: the memory that this session took."""

    @abc.abstractmethod
    def draw(self) -> None:
        """Draws the figures from the files."""


class AbstractSession(abc.ABC, Generic[SettingsT, StateT]):
    """The skeleton of a run and of a training.

    A session that is killed at any point leaves a folder that the same command resumes.
    """

    results: ClassVar[tuple[str, ...]] = ()  # files besides those of every session

    def __init__(self, settings: SettingsT) -> None:
        self.settings = settings

    @abc.abstractmethod
    def state(self, checkpoint: Checkpoint) -> StateT:
        """The inverse of `AbstractWork.checkpoint`."""

    @abc.abstractmethod
    def prepare(
        self, *, should_stop: Callable[[], bool], began_with: Mapping[str, str] | None
    ) -> AbstractWork[StateT]:
        """Loads and checks everything that the work needs, and writes nothing into the folder.

        Args:
            should_stop: whether the work is to save its state and end.
            began_with: the inputs of the work that is resumed; None for new work.

        Raises:
            ConfigError: the user can fix it; for instance, an input is no longer the same.
            Stopped: it was to stop.
        """

    @abc.abstractmethod
    def already_done(self) -> str:
        """The warning in place of work that is complete. Raises ConfigError if its files besides
        dataset and model have changed since.
        """

    @final
    def run(self, *, leave_failed: bool = False) -> int:
        """Works to the end, or resumes the work where it was interrupted. Returns the exit code.

        Args:
            leave_failed: do nothing if an earlier session failed.

        Raises:
            ConfigError: the user can fix it.
            Busy: another process holds the folder's lock and `when_locked` is "leave".
            OutOfSpace: the disk is full.
        """
        settings, folder, warn = self.settings, self.settings.folder, self.settings.tracker.warning
        with locked(
            folder,
            may_wait=settings.when_locked == "wait",
            waiting=lambda holder: warn(f"waiting for {holder}: {folder}"),
        ):
            if settings.resume != "never":
                if (folder / DONE).exists():
                    require_unchanged(folder, settings.model, settings.data)
                    warn(self.already_done())
                    return OK
                if leave_failed and (folder / FAILED).exists():
                    warn(f"failed before, and left so: {folder} (retry_failed=true tries again)")
                    return FAILURE
            with stop_signals() as received, warnings_shown(settings.tracker):
                try:
                    return self.execute(received)
                except OSError as error:
                    if out_of_space_number(error) is None:
                        raise
                    raise out_of_space(folder, error) from error

    @final
    def execute(self, received: Received) -> int:
        """The work between its first and its last file. The caller holds the folder's lock."""
        settings, folder, started = self.settings, self.settings.folder, time.time()
        is_anew = settings.resume == "never"
        checkpoint = None if is_anew else read_checkpoint(folder / STATE)
        state = None if checkpoint is None else self.state(checkpoint)
        record_bytes = {} if checkpoint is None else checkpoint.record_bytes
        files = settings.model.files_digest()  # before they are read
        try:
            work = self.prepare(
                should_stop=lambda: received.number is not None,
                began_with=None if checkpoint is None else checkpoint.inputs,
            )
        except Stopped:
            return SIGNALLED + (received.number or 0)
        # Only now: an error until here must not cost the earlier results.
        if is_anew:
            clear(folder, self.results)
        remove_unfinished(folder)
        num_lost = 0
        if checkpoint is not None:
            num_lost = steps_after(folder / STEPS, record_bytes.get(STEPS, 0))
        records, tracker = (
            RecordFiles(folder, record_bytes, work.ledger()),
            Guarded(settings.tracker),
        )
        config = yaml.safe_dump(dict(settings.config), sort_keys=False)
        write_atomically(folder / CONFIG, config.encode())
        (folder / FAILED).unlink(missing_ok=True)
        tracker.open(replace(work.info(), resumed_at=0 if state is None else state.step))
        for warning in work.warnings():
            tracker.warning(warning)
        status: Status = "failed"
        is_full = False
        is_complete = state is not None and work.reached(state)
        events = work.events(state)
        del checkpoint, state  # of a training, its tensors are several times the network's size
        try:
            for event in events:
                if isinstance(event, LedgerRecord):
                    records.append_block(event)
                elif isinstance(event, StepRecord | EvalRecord | SampleRecord):
                    write_record(event, folder, records, tracker)
                else:
                    write_checkpoint(work.checkpoint(event, records.sync()), folder / STATE)
                    is_complete = work.reached(event)
                del event  # for the same reason
            status = "done" if is_complete else "interrupted"
        except Exception as error:
            is_full = out_of_space_number(error) is not None
            if is_full:
                raise
            collapsed = work.collapsed(error)
            save_failure(folder, error, collapsed)
            if collapsed is None:
                raise
            status = "collapsed"
            if collapsed.warning is not None:
                tracker.warning(collapsed.warning)
        finally:
            records.close()
            try:
                if not is_full:
                    work.save_results()
                    save_provenance(
                        folder,
                        work.provenance(),
                        model_files=files,
                        seconds=time.time() - started,
                        num_lost=num_lost,
                        measured=work.measured(),
                    )
                    draw(work, tracker)
                    # Last: a session that is killed before this is repeated, and draws the figures.
                    if status == "done":
                        write_atomically(folder / DONE, b"")
            except OSError:
                status = "failed"
                raise
            finally:
                tracker.close(status)
        return {"done": OK, "collapsed": FAILURE}.get(status, SIGNALLED + (received.number or 0))


def draw(work: AbstractWork[Any], tracker: AbstractTracker) -> None:
    """Draws the figures. An error of a library is only a warning: the figures can be drawn again,
    the work cannot.

    Raises:
        OSError: the disk is full.
    """
    try:
        work.draw()
    except Exception as error:
        if out_of_space_number(error) is not None:
            raise
        tracker.warning(f"no figures: {type(error).__name__}: {error}")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The model of a session, with the inputs so far."""

    model: EditableModel
    data: LoadedDataset  # with `known_only`, the facts that the model knows
    inputs: Mapping[str, str]  # digests of the dataset and the model
    peaks: Peaks


def load_model(
    settings: Settings,
    began_with: Mapping[str, str] | None,
    *,
    should_stop: Callable[[], bool],
    training: Trained | None = None,
    edits: int | None = None,
) -> Loaded:
    """Loads the model after the checks that need no model, and selects the facts that it knows if
    only these are wanted.

    Args:
        training: the editor that is trained.
        edits: the number of known facts that suffices; None: all are needed.

    Raises:
        ConfigError: the dataset, the model or what it knows is not what the work began with, the
            device is missing, the memory does not suffice, or too few facts are known.
        Stopped: it was to stop while the model was asked for the facts.
    """
    runtime, data = settings.runtime, settings.data
    if runtime.threads:
        torch.set_num_threads(runtime.threads)
    inputs = of_dataset(data.provenance())
    require_same(began_with, inputs, source=data.origin)
    require_device(runtime.device)
    require_fit(settings.demand, training=training, free_bytes=free_bytes(settings.demand))
    peaks = Peaks(runtime.device)
    with peaks.phase("load"):
        model = settings.model.load(runtime.device)
    network = {MODEL: model.fingerprint}
    require_same(began_with, network, source=settings.model.id)
    if model.chat is not None:
        network[CHAT] = model.chat.label
        source = str(settings.model.chat_template)
        require_same(began_with, {CHAT: model.chat.label}, source=source)
    if data.known_only:
        with peaks.phase("known"):
            check_reading(model, joined(data.requests[0].probe()))  # answers take shortcuts
            data = select_known(model, data, edits=edits, should_stop=should_stop)
        known = {KNOWN: digest_of(data.requests[:edits])}
        require_same(began_with, known, source="what the unedited model knows")
        inputs |= known
    return Loaded(model=model, data=data, inputs=inputs | network, peaks=peaks)


def write_record(
    record: StepRecord | EvalRecord | SampleRecord,
    folder: Path,
    records: RecordFiles,
    tracker: AbstractTracker,
) -> None:
    """Writes a record, then passes it to the tracker."""
    if isinstance(record, SampleRecord):
        save_samples(record, folder / "samples")
        tracker.samples(record)
        return
    records.append(record)
    if isinstance(record, StepRecord):
        tracker.step(record)
    else:
        tracker.evaluation(record)
