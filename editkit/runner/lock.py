"""The lock of a run's folder: one process at a time runs or trains in it.

The lock ends with the process that holds it (`editkit.files.take_lock`). The holder writes its name
into the lock's file, for people to read.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from editkit.errors import ConfigError, message
from editkit.files import LOCK, read_object, take_lock

PATIENCE_S = 0.5  # `is_locked` of another process holds the lock for an instant


class Busy(ConfigError):
    """Another process holds the lock of the folder."""

    exit_code = 3


@contextlib.contextmanager
def locked(
    folder: Path, *, may_wait: bool = False, waiting: Callable[[str], None] = lambda holder: None
) -> Iterator[None]:
    """Holds the lock of a folder, which is created if it is missing.

    Args:
        may_wait: whether to wait until another holder ends. `waiting` is then called with the
            description of that holder.

    Raises:
        Busy: another process holds the lock and `may_wait` is false.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+") as file:
        if not _taken(file, patience_s=PATIENCE_S):
            holder = describe_holder(folder)
            if not may_wait:
                raise Busy(
                    message(
                        str(folder),
                        f"the run is being written by another process ({holder})",
                        fix="wait for that process (when_locked=wait), or change the experiment or "
                        "the seed",
                    )
                )
            waiting(holder)
            take_lock(file, patience_s=None)
        file.truncate(0)
        file.write(json.dumps(_myself()) + "\n")
        file.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether a living process holds the lock. Neither takes the lock nor creates its file."""
    try:
        with open(folder / LOCK) as file:
            return not take_lock(file, shared=True)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def holder_of(folder: Path) -> dict[str, Any]:
    """The last holder as it described itself; that process may have ended. Empty if the file cannot
    be read.
    """
    return read_object(folder / LOCK)


def describe_holder(folder: Path) -> str:
    """The last holder in words: process, host, Slurm job."""
    holder = holder_of(folder)
    slurm_job = f", Slurm job {holder['slurm_job']}" if holder.get("slurm_job") else ""
    return (
        f"process {holder['pid']} on {holder['host']}{slurm_job}"
        if {"pid", "host"} <= holder.keys()
        else "it does not say which"
    )


def _myself() -> dict[str, Any]:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    slurm_job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": round(time.time(), 3),
        "slurm_job": slurm_job,
    }


def _taken(file: IO[str], *, patience_s: float) -> bool:
    """A file system without locks counts as locked: two processes would mix their records."""
    try:
        return take_lock(file, patience_s=patience_s)
    except OSError:
        return False
