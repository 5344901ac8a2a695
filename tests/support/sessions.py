"""Runs in processes of their own, and the records that they leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from editkit.records.writer import STEPS


def start(outputs: Path, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """`editkit run`, on one thread."""
    return subprocess.Popen(
        [sys.executable, "-m", "editkit", "run", *arguments, f"paths.outputs={outputs}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(outputs: Path, arguments: Sequence[str], *, patience_s: float = 300) -> Path:
    """The folder of the run, which must end without an error."""
    process = start(outputs, arguments)
    _, errors = process.communicate(timeout=patience_s)
    assert process.returncode == 0, errors.decode()
    return run_folder(outputs)


def run_folder(outputs: Path) -> Path:
    """The folder of the only run."""
    (folder,) = outputs.glob("*/*/seed*")
    return folder


def records(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a record file without what a clock measured."""
    return [
        {**json.loads(line), "seconds": None} for line in (folder / name).read_text().splitlines()
    ]


def wait_for_lines(process: subprocess.Popen[bytes], outputs: Path, count: int) -> None:
    """Until the process has written so many steps, or has ended."""
    while process.poll() is None:
        paths = list(outputs.glob(f"*/*/seed*/{STEPS}"))
        if paths and paths[0].read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.005)
