"""How far a run has come, from the files in its folder alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from editkit.errors import ConfigError
from editkit.records.writer import STEPS
from editkit.runner.checkpoint import read_pointer
from editkit.runner.lock import describe_holder, is_locked
from editkit.runner.provenance import PROVENANCE
from editkit.runner.session import DONE, FAILED

# done: all edits made. running: a living process holds the lock. failed: it ended with an error, or
# collapsed. cut off: it was stopped or killed, and goes on from its checkpoint. missing: nothing
# was recorded.
State = Literal["done", "running", "failed", "cut off", "missing"]
STATES: tuple[State, ...] = ("done", "running", "failed", "cut off", "missing")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """What a run's folder says."""

    state: State
    step: int | None = None  # the last one that was recorded
    saved_step: int | None = None  # the one that it would go on from
    error: str | None = None
    holder: str | None = None  # who is writing
    steps_made_again: int = 0  # after it was cut off, over all its sessions


def look(folder: Path) -> RunStatus:
    """The status of a run. Reads a few small files and the end of one."""
    step, saved = last_step(folder / STEPS), _saved_step(folder / "state")
    again = _number(folder / PROVENANCE, "steps_made_again")

    def status(state: State, error: str | None = None, holder: str | None = None) -> RunStatus:
        return RunStatus(
            state=state,
            step=step,
            saved_step=saved,
            error=error,
            holder=holder,
            steps_made_again=again,
        )

    if (folder / DONE).exists():
        return status("done")
    if is_locked(folder):
        return status("running", holder=describe_holder(folder))
    if (folder / FAILED).exists():
        return status("failed", error=failure(folder))
    return status("missing" if step is None and saved is None else "cut off")


def failure(folder: Path) -> str:
    """What FAILED.json says, on one line."""
    try:
        return " ".join(str(json.loads((folder / FAILED).read_text())["error"]).split())
    except (OSError, ValueError, KeyError, TypeError):
        return f"{FAILED} cannot be read"


def last_step(path: Path) -> int | None:
    """The step of the last whole line of a `steps.jsonl`."""
    block = 1 << 16
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            while True:
                file.seek(max(0, size - block))
                whole = file.read().rpartition(b"\n")[0]
                if b"\n" in whole or block >= size:
                    break
                block *= 4
        return int(json.loads(whole.rpartition(b"\n")[2])["step"])
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
