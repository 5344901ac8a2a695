"""The files of a run's or training's folder that say how it ended, and their removal."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.errors import OutOfSpace, message
from editkit.files import write_atomically
from editkit.records.ledger import FACTORS, LEDGER
from editkit.records.writer import EVALS, STEPS
from editkit.runner.checkpoint import LATEST, read_pointer
from editkit.runner.provenance import PROVENANCE

DONE, FAILED, CONFIG, STATE = "DONE", "FAILED.json", "config.yaml", "state"


@dataclass(frozen=True, kw_only=True)
class Collapsed:
    """A number that is not finite ended the session."""

    kind: str  # in FAILED.json
    step: int
    warning: str | None = None  # for the tracker


def out_of_space(folder: Path, error: OSError) -> OutOfSpace:
    """The error of a full disk, with what is saved."""
    saved = read_pointer(folder / STATE)
    kept = "no checkpoint was saved" if saved is None else f"step {saved['step']} is saved"
    return OutOfSpace(
        message(
            str(error.filename or folder),
            f"cannot be written ({error.strerror}); {kept}",
            fix="free space and repeat the command, which resumes the run",
        )
    )


def save_failure(folder: Path, error: Exception, collapsed: Collapsed | None) -> None:
    """Writes FAILED.json: the error, and the checkpoint from which the same command resumes."""
    failure: dict[str, Any] = (
        {
            "kind": "error",
            "error": f"{type(error).__name__}: {error}",
            "traceback": "".join(traceback.format_exception(error)),
        }
        if collapsed is None
        else {"kind": collapsed.kind, "error": str(error), "step": collapsed.step}
    )
    saved = read_pointer(folder / STATE)
    where = (
        {"state": f"{STATE}/{saved['file']}", "saved_step": saved["step"]}
        if saved
        else {"state": None, "saved_step": None}
    )
    write_atomically(folder / FAILED, json.dumps(failure | where, indent=1).encode())


def steps_after(path: Path, num_bytes: int) -> int:
    """The number of steps recorded after the checkpoint, which a resumed session repeats."""
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(num_bytes)
        return file.read().count(b"\n")


def remove_unfinished(folder: Path) -> None:
    """Removes the files that killed sessions were writing. The caller holds the folder's lock."""
    for place in (folder, folder / STATE, folder / "samples", folder / FACTORS):
        for path in place.glob(".*.tmp"):
            path.unlink(missing_ok=True)


def clear(folder: Path, results: Sequence[str] = ()) -> None:
    """Removes the files of earlier sessions.

    The order matters. A process killed at any point leaves work that resumes as before, or work
    that has not begun; never half of complete work.
    """
    for name in (DONE, FAILED, f"{STATE}/{LATEST}", STEPS, EVALS, LEDGER, PROVENANCE, CONFIG):
        (folder / name).unlink(missing_ok=True)
    for name in (STATE, FACTORS, "figures", "samples", "wandb"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in results:
        (folder / name).unlink(missing_ok=True)
