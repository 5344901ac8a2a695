"""One process a run: a lock on the run's folder that goes with the process that holds it, however
that process ends.

The kernel keeps it (flock), so a holder that was killed leaves nothing to clean up. Between
machines it holds where the shared file system passes flock on: NFS does, Lustre when it is mounted
with `flock`. Who holds it stands in the file, for people to read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError
from editkit.files import read_object

LOCK = ".lock"
PATIENCE_S = 0.5  # a look at the lock, as `is_locked` takes it, holds it for an instant


class Busy(ConfigError):
    """Another process has the run."""


@contextlib.contextmanager
def locked(
    folder: Path, *, may_wait: bool = False, waiting: Callable[[str], None] = lambda holder: None
) -> Iterator[None]:
    """Holds the lock of a run's folder, which is made if it is not there.

    Args:
        may_wait: whether to wait for another holder to end; `waiting` is then told who that is.
        Otherwise raises Busy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as file:
        if not _taken_soon(file.fileno()):
            holder = describe_holder(folder)
            if not may_wait:
                raise Busy(
                    f"{folder} is being written by another process ({holder}): wait for it (when_locked=wait), "
                    "or change the experiment or the seed."
                )
            waiting(holder)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(json.dumps(_myself()) + "\n")
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether a living process holds the lock."""
    try:
        with open(folder / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def holder_of(folder: Path) -> dict[str, Any]:
    """What the last holder wrote of itself; it may be dead. Empty where that cannot be read."""
    return read_object(folder / LOCK)


def describe_holder(folder: Path) -> str:
    """The holder in words."""
    holder = holder_of(folder)
    job = f", Slurm job {holder['slurm_job']}" if holder.get("slurm_job") else ""
    return (
        f"process {holder['pid']} on {holder['host']}{job}"
        if {"pid", "host"} <= holder.keys()
        else "it does not say which"
    )


def _myself() -> dict[str, Any]:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": round(time.time(), 3),
        "slurm_job": job,
    }


def _taken_soon(file: int) -> bool:
    """Tries for a moment."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
