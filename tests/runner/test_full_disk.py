"""A full disk ends a run with one message. Files written before are intact, and the same command
resumes to the same bits.
"""

from __future__ import annotations

import contextlib
import errno
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from editkit.files import out_of_space_number, write_atomically, written_atomically
from editkit.records.writer import EVALS, STEPS, RecordFiles
from editkit.types import StepRecord

RUN = (
    *("model=tiny-gpt2", "editor=memit", "restraint=prune", "suite=none", "tracker=none"),
    *("edits=12", "milestones=[0,4,12]", "checkpoint.every=3", "editor.target.steps=3"),
    *("editor.context_lengths=[[5,2]]", "stats.num_documents=1000"),
)


@contextlib.contextmanager
def files_of_at_most(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond this size, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_that_does_not_fit_leaves_the_earlier_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_atomically(path, b"before")
    with files_of_at_most(1000), pytest.raises(OSError) as raised:
        write_atomically(path, b"0" * 2000)
    assert raised.value.errno == errno.EFBIG and raised.value.filename == str(path)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_a_library_writes_fails_in_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"

    def save(size: int) -> None:
        with written_atomically(path) as temporary:
            save_file({"a": torch.full((size,), float(size))}, temporary)

    save(10)
    with files_of_at_most(1000), pytest.raises(OSError) as raised:
        save(1000)
    assert out_of_space_number(raised.value) == errno.EFBIG and raised.value.filename == str(path)
    assert load_file(path)["a"].tolist() == [10.0] * 10 and list(tmp_path.iterdir()) == [path]


def test_records_that_do_not_fit_do_not_hide_the_error_when_the_files_are_closed(
    tmp_path: Path,
) -> None:
    with files_of_at_most(100):
        records = RecordFiles(tmp_path, {})
        with pytest.raises(OSError) as raised:
            for step in range(10):
                records.append(StepRecord(step=step, modules={}))
        records.close()
    assert out_of_space_number(raised.value) == errno.EFBIG
    RecordFiles(tmp_path, {STEPS: 0, EVALS: 0}).close()
    assert (tmp_path / STEPS).read_bytes() == b""


def test_other_errors_are_no_full_disk() -> None:
    assert out_of_space_number(FileNotFoundError(errno.ENOENT, "no such file")) is None
    assert out_of_space_number(ValueError("Error while serializing (os error 13)")) is None
    assert out_of_space_number(ValueError("I/O error: No space left on device (os error 28)")) == 28


def run(outputs: Path, stats: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "editkit", "run", *RUN, f"paths.outputs={outputs}"]
    return subprocess.run(
        [*command, f"stats.folder={stats}"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def records(outputs: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of both record files, without seconds."""
    (folder,) = {path.parent for path in outputs.glob("*/*/*/DONE")}
    lines = {name: (folder / name).read_text().splitlines() for name in (STEPS, EVALS)}
    return {
        name: [json.loads(line) | {"seconds": None} for line in rows]
        for name, rows in lines.items()
    }


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of that size. Skips if this user may not mount one."""
    folder.mkdir()
    size = f"size={kilobytes}k"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], check=False)
    if made.returncode:
        pytest.skip("no small file system: mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_run_on_a_full_disk_resumes_to_the_same_bits_once_there_is_space(tmp_path: Path) -> None:
    stats = tmp_path / "statistics"
    undisturbed = run(tmp_path / "whole", stats)
    assert undisturbed.returncode == 0, undisturbed.stderr
    sizes = [path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    saved = set()
    whole = sum(sizes) // 1024
    # The smallest has no room for the first checkpoint.
    for kilobytes in (16, whole // 2, whole * 3 // 4, whole * 19 // 20):
        with small_disk(tmp_path / f"disk{kilobytes}", kilobytes) as disk:
            full = run(disk, stats)
            assert full.returncode == 4, full.stderr
            assert "Traceback" not in full.stderr and "Fix: free space and repeat" in full.stderr
            assert not list(disk.rglob("*.tmp")) and not list(disk.rglob("DONE"))
            saved.add("is saved" in full.stderr)
            subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
            again = run(disk, stats)
            assert again.returncode == 0, again.stderr
            assert records(disk) == records(tmp_path / "whole")
    assert saved == {False, True}
