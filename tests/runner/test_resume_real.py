"""A run of the real model, on its own facts, is killed and resumed to the bits of an undisturbed
run.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from editkit.records.writer import EVALS, STEPS
from editkit.runner.checkpoint import load_state
from tests.support.helpers import real_model_id
from tests.support.sessions import finish, records, run_folder, start, wait_for_lines

pytestmark = pytest.mark.real

RUN = (
    *("experiment=real", "dataset.known_only=false", "suite=none", "runtime.threads=1"),
    *("edits=4", "milestones=[0,2,4]", "checkpoint.every=1", "evaluation.max_requests=2"),
    *("editor.covariance=false", "editor.target.steps=3", "editor.context_lengths=[[5,2]]"),
)


def test_a_killed_run_resumes_to_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    real_model_id()  # skips without the package
    undisturbed = finish(tmp_path / "undisturbed", RUN, patience_s=600)
    outputs = tmp_path / "killed"
    process = start(outputs, RUN)
    wait_for_lines(process, outputs, 4)  # the unedited model and three edits
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = (run_folder(outputs) / STEPS).read_bytes()
    assert written.count(b"\n") >= 4 and not (run_folder(outputs) / "DONE").exists()
    killed = finish(outputs, RUN, patience_s=600)
    for name in (STEPS, EVALS):
        assert records(killed, name) == records(undisturbed, name)
    ours, theirs = load_state(killed / "state"), load_state(undisturbed / "state")
    assert ours.step == theirs.step == 4
    for module, total in ours.totals.items():
        assert torch.equal(total.dense(), theirs.totals[module].dense())
