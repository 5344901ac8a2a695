"""`editkit push`: sends the files of runs to W&B, independently of what a live tracker sent.

The W&B run has the id of the live one and is replaced as a whole, so nothing appears twice.
`wandb.json` in the run's folder holds a digest of the files that were sent completely; the same
files are not sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from editkit.files import LOCK, take_lock
from editkit.records.reader import load_run
from editkit.records.samples import read_samples
from editkit.trackers.history import rows
from editkit.trackers.remote import cell_id
from editkit.types import SampleRecord
from editkit.wandb.client import Target, WandbRun, read_marker

Outcome = Literal["sent", "there already", "still running"]
SENT = ("steps.jsonl", "evals.jsonl", "config.yaml", "DONE", "FAILED.json")


def push(folder: Path, target: Target, *, force: bool = False) -> Outcome:
    """Sends one run, unless W&B has it already (`force` overrides that) or a process is writing it.
    It may raise W&B's errors.
    """
    with _unless_written(folder) as is_free:
        if not is_free:
            return "still running"
        records, digest, marker = load_run(folder), _digest(folder, target), read_marker(folder)
        if marker.get("pushed") == digest and marker.get("mode") == target.mode and not force:
            return "there already"
        # A run started by a sweep's agent keeps the agent's id; otherwise the id is the cell's.
        sent = WandbRun(
            folder, records.config, target, id=marker.get("id") or cell_id(folder), resume=False
        )
        tables: dict[int, list[SampleRecord]] = {}
        for record in read_samples(records):
            tables.setdefault(record.step, []).append(record)
        for step, row in rows(
            records.steps, records.evals, trajectory=records.trajectory_view
        ).items():
            sent.log(row, step=step)
            for record in tables.get(step, ()):
                sent.samples(record)
        sent.mark(pushed=None)
        sent.conclude(failed=records.status == "failed")
        sent.mark(pushed=digest)
        return "sent"


def _digest(folder: Path, target: Target) -> str:
    """Of the files that are sent, and of their destination."""
    hashed = hashlib.sha256(
        repr(
            (target.project, target.entity, target.artifacts, target.figures, target.max_samples)
        ).encode()
    )
    for path in sorted(
        [
            *(folder / name for name in SENT),
            *folder.glob("samples/*.gz"),
            *folder.glob("figures/*.png"),
        ]
    ):
        if path.exists():
            hashed.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return hashed.hexdigest()


@contextlib.contextmanager
def _unless_written(folder: Path) -> Iterator[bool]:
    """Whether no other process holds the run's lock. Within, no process can take it.

    A file system without locks counts as locked: half a run would be sent.
    """
    with open(folder / LOCK, "a") as file:
        try:
            is_free = take_lock(file)
        except OSError:
            is_free = False
        yield is_free
