"""Locks: a second process leaves or waits, a dead holder holds nothing, and a file system without
locks is handled by each user of a lock.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from editkit.files import take_lock
from editkit.runner.lock import Busy, describe_holder, holder_of, is_locked, locked
from editkit.stats import parts
from editkit.wandb import push

HOLD = """
import sys, time
from pathlib import Path
from editkit.runner.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_the_second_leaves_and_says_who_holds_it(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        assert is_locked(tmp_path)
        with (
            pytest.raises(Busy, match=f"written by another process \\(process {process.pid} on "),
            locked(tmp_path),
        ):
            pytest.fail("two processes hold the lock")
        assert holder_of(tmp_path)["pid"] == process.pid, (
            "who leaves does not overwrite the holder's name"
        )
    finally:
        end(process)


def test_a_killed_holder_leaves_the_lock_free(tmp_path: Path) -> None:
    end(hold(tmp_path))
    assert not is_locked(tmp_path)
    with locked(tmp_path):
        assert holder_of(tmp_path)["pid"] == os.getpid()


def test_the_second_can_wait_for_the_first_to_end(tmp_path: Path) -> None:
    process = hold(tmp_path)
    holders: list[str] = []

    def waiting(holder: str) -> None:
        holders.append(holder)
        threading.Timer(0.2, process.kill).start()

    with locked(tmp_path, may_wait=True, waiting=waiting):
        assert process.wait(timeout=10) == -signal.SIGKILL
    process.communicate()
    assert holders and str(process.pid) in holders[0]


def test_looking_at_a_lock_neither_takes_nor_makes_it(tmp_path: Path) -> None:
    assert not is_locked(tmp_path) and not list(tmp_path.iterdir())
    with locked(tmp_path):
        assert is_locked(tmp_path)
    assert not is_locked(tmp_path)


def test_a_slurm_job_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with locked(tmp_path):
        assert describe_holder(tmp_path).endswith(", Slurm job 12_3")
    (tmp_path / ".lock").write_text("half a li")
    assert describe_holder(tmp_path) == "it does not say which"


def test_a_lock_is_given_up_after_the_patience_and_coexists_with_shared_ones(
    tmp_path: Path,
) -> None:
    path = tmp_path / "lock"
    with open(path, "w") as first, open(path) as second, open(path) as third:
        assert take_lock(second, shared=True) and take_lock(third, shared=True)
        started = time.monotonic()
        assert not take_lock(first, patience_s=0.1)
        assert 0.1 <= time.monotonic() - started < 5
    with open(path, "w") as first:
        assert take_lock(first, patience_s=None)


def test_a_file_system_without_locks_is_locked_for_runs_and_free_for_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(Busy), locked(tmp_path):
        pytest.fail("a run cannot be protected here")
    with pytest.raises(OSError, match="No locks"), locked(tmp_path, may_wait=True):
        pytest.fail("nor can it wait")
    assert is_locked(tmp_path)
    for may_wait in (False, True):
        with parts.locked(tmp_path / "part-0.lock", may_wait=may_wait) as is_mine:
            assert is_mine
    with push._unless_written(tmp_path) as is_free:
        assert not is_free
