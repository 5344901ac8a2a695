"""A run of the real model, on its own facts, is killed and resumed to the bits of an undisturbed
run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from editkit.records.writer import EVALS, STEPS
from editkit.runner.checkpoint import load_state
from tests.support.helpers import real_model_id

pytestmark = pytest.mark.real

RUN = (
    *("experiment=real", "dataset.known_only=false", "suite=none", "runtime.threads=1"),
    *("edits=4", "milestones=[0,2,4]", "checkpoint.every=1", "evaluation.max_requests=2"),
    *("editor.covariance=false", "editor.target.steps=3", "editor.context_lengths=[[5,2]]"),
)


def start(outputs: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "editkit", "run", *RUN, f"paths.outputs={outputs}"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(outputs: Path) -> Path:
    process = start(outputs)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()
    (folder,) = outputs.glob("*/*/seed*")
    return folder


def lines(outputs: Path, name: str) -> list[dict[str, object]]:
    """The records of a run without what a clock measured; none before it began."""
    whole = [
        line
        for path in outputs.glob(f"*/*/seed*/{name}")
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]
    return [{**json.loads(line), "seconds": None} for line in whole]


def test_a_killed_run_resumes_to_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    real_model_id()  # skips without the package
    undisturbed = finish(tmp_path / "undisturbed")
    outputs = tmp_path / "killed"
    process = start(outputs)
    while process.poll() is None and len(lines(outputs, STEPS)) < 4:  # the unedited model and 3
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(lines(outputs, STEPS)) >= 4 and not list(outputs.glob("*/*/seed*/DONE"))
    killed = finish(outputs)
    for name in (STEPS, EVALS):
        assert lines(outputs, name) == lines(tmp_path / "undisturbed", name)
    ours, theirs = load_state(killed / "state"), load_state(undisturbed / "state")
    assert ours.step == theirs.step == 4
    for module, total in ours.totals.items():
        assert torch.equal(total.dense(), theirs.totals[module].dense())
