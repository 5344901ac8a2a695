"""The memory of a long run does not grow with its edits."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from editkit.records.writer import STEPS

EDITS = 2000
RUN = (
    *("model=tiny-gpt2", "editor=rome", "suite=none", "tracker=none", f"edits={EDITS}"),
    *("milestones=[]", "telemetry.every=20", "checkpoint.every=100", "editor.target.steps=1"),
    *("editor.context_lengths=[[2,1]]", "stats.num_documents=500"),
)


def resident_bytes(process: int) -> int:
    """The process's resident set."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def test_the_second_half_of_two_thousand_edits_takes_no_more_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "editkit", "run", *RUN, f"paths.outputs={tmp_path / 'out'}"]
    process = subprocess.Popen(
        [*command, f"stats.folder={tmp_path / 'stats'}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    bytes_by_step: dict[int, int] = {}
    while process.poll() is None:
        for path in tmp_path.glob(f"out/*/*/seed0/{STEPS}"):
            step = path.read_bytes().count(b"\n") - 1
            try:
                bytes_by_step[step] = resident_bytes(process.pid)
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                break
        time.sleep(0.1)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    # Not the last step, after which figures are drawn.
    second = [size for step, size in bytes_by_step.items() if EDITS // 2 <= step < EDITS]
    assert len(second) >= 20
    assert max(second) <= 1.05 * min(second)
