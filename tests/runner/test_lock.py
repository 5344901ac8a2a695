"""The lock of a run: a second process leaves or waits, and a dead holder holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from editkit.runner.lock import Busy, describe_holder, holder_of, is_locked, locked

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
    told: list[str] = []

    def waiting(holder: str) -> None:
        told.append(holder)
        threading.Timer(0.2, process.kill).start()

    with locked(tmp_path, may_wait=True, waiting=waiting):
        assert process.wait(timeout=10) == -signal.SIGKILL
    process.communicate()
    assert told and str(process.pid) in told[0]


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
