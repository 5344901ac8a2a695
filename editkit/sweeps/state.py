"""The progress of a run, read from the files of its folder alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from editkit.errors import ConfigError
from editkit.records.writer import STEPS
from editkit.runner.checkpoint import read_pointer
from editkit.runner.folder import DONE, FAILED
from editkit.runner.lock import describe_holder, is_locked
from editkit.runner.provenance import PROVENANCE

# done: all edits are made. running: a living process holds the lock. failed: the run ended with an
# error, or collapsed. interrupted: it was stopped or killed, and resumes from its checkpoint.
# missing: nothing was recorded.
State = Literal["done", "running", "failed", "interrupted", "missing"]
STATES: tuple[State, ...] = ("done", "running", "failed", "interrupted", "missing")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """The progress of a run."""

    state: State
    step: int | None = None  # the last recorded step
    saved_step: int | None = None  # the step of the checkpoint
    error: str | None = None
    holder: str | None = None  # the process that is writing
    steps_made_again: int = 0  # after interruptions, summed over all sessions


def read_status(folder: Path) -> RunStatus:
    """The status of the run in a folder. A few small files and the end of one file are read."""
    step, saved_step = last_step(folder / STEPS), _saved_step(folder / "state")
    made_again = _number(folder / PROVENANCE, "steps_made_again")

    def status(state: State, error: str | None = None, holder: str | None = None) -> RunStatus:
        return RunStatus(
            state=state,
            step=step,
            saved_step=saved_step,
            error=error,
            holder=holder,
            steps_made_again=made_again,
        )

    if (folder / DONE).exists():
        return status("done")
    if is_locked(folder):
        return status("running", holder=describe_holder(folder))
    if (folder / FAILED).exists():
        return status("failed", error=failure(folder))
    return status("missing" if step is None and saved_step is None else "interrupted")


def failure(folder: Path) -> str:
    """The error in FAILED.json, on one line."""
    try:
        return " ".join(str(json.loads((folder / FAILED).read_text())["error"]).split())
    except (OSError, ValueError, KeyError, TypeError):
        return f"{FAILED} cannot be read"


def last_step(path: Path) -> int | None:
    """The step of the last complete line of a `steps.jsonl`."""
    block = 1 << 16
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            while True:
                file.seek(max(0, size - block))
                complete = file.read().rpartition(b"\n")[0]
                if b"\n" in complete or block >= size:
                    break
                block *= 4
        return int(json.loads(complete.rpartition(b"\n")[2])["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _saved_step(folder: Path) -> int | None:
    try:
        pointer = read_pointer(folder)
    except ConfigError:
        return None
    return pointer["step"] if pointer else None


def _number(path: Path, key: str) -> int:
    try:
        return int(json.loads(path.read_text()).get(key, 0))
    except (OSError, ValueError, AttributeError):
        return 0
