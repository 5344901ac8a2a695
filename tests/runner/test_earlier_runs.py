"""Runs that an earlier version made are recognised, and a half-done one resumes.

`tests/data/runs_before_rooms` holds two folders written by commit d301527, before the package was
divided into rooms: the same command once run to its end and once stopped after three of six edits.
`tests/data/run_names.json` holds the run folders that this commit gave to 124 commands. The presets
that have been corrected since then are not among them.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from editkit.config.build import locate
from editkit.config.compose import compose
from editkit.config.identity import FORMER_PATHS, config_hash, current_path, stable_name
from editkit.config.schema import Problems, resolve
from editkit.records.reader import load_run
from editkit.runner.checkpoint import load_state
from tests.support.paths import TESTS

EARLIER = TESTS / "data" / "runs_before_rooms"
NAMES = json.loads((TESTS / "data" / "run_names.json").read_text())
COMMAND = (
    *("model=tiny-gpt2", "editor=rome", "editor.covariance=null", "restraint=[prune,rect]"),
    *("edits=6", "milestones=[3,6]", "suite=none", "checkpoint.every=1", "runtime.threads=1"),
    *("name=old", "tracker=none"),
)


def run(outputs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "editkit", "run", *COMMAND, f"paths.outputs={outputs}", *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def earlier(kind: str, outputs: Path) -> Path:
    """A copy of an earlier run's folder where the command looks for it."""
    folder = outputs / "default" / "old-084a5935" / "seed0"
    shutil.copytree(EARLIER / kind, folder)
    return folder


@pytest.mark.parametrize(
    ("overrides", "folder"),
    NAMES,
    ids=lambda each: " ".join(each) if isinstance(each, list) else "",
)
def test_a_command_finds_the_folder_that_it_had_before(overrides: list[str], folder: str) -> None:
    composed = compose([*overrides, "paths.outputs=o"])
    assert str(locate(composed.config, choices=composed.choices).folder) == folder


def test_a_run_that_an_earlier_version_finished_is_done(tmp_path: Path) -> None:
    folder = earlier("done", tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = run(tmp_path, "tracker=console")
    assert done.returncode == 0, done.stderr
    assert "already done" in done.stdout + done.stderr
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.slow
def test_a_run_that_an_earlier_version_began_ends_in_the_same_bits(tmp_path: Path) -> None:
    folder = earlier("half", tmp_path / "resumed")
    done = run(tmp_path / "resumed")
    assert done.returncode == 0, done.stderr
    assert (folder / "DONE").exists()
    assert run(tmp_path / "anew").returncode == 0
    (anew,) = (tmp_path / "anew").glob("default/*/seed0")
    whole = load_state(anew / "state")
    found, expected = load_state(folder / "state"), load_state(EARLIER / "done" / "state")
    # A processor with other instructions rounds otherwise: what an uninterrupted run gives here
    # says whether the bits of the machine that made the fixture can be asked for.
    is_same_machine = all(
        torch.equal(whole.totals[module].dense(), expected.totals[module].dense())
        for module in expected.totals
    )
    for module, total in expected.totals.items():
        if is_same_machine:
            assert torch.equal(found.totals[module].dense(), total.dense())
        else:
            torch.testing.assert_close(
                found.totals[module].dense(), total.dense(), rtol=1e-3, atol=1e-4
            )
    if is_same_machine:
        assert (folder / "evals.jsonl").read_bytes() == (
            EARLIER / "done" / "evals.jsonl"
        ).read_bytes()
    records, earlier_records = load_run(folder), load_run(EARLIER / "done")
    assert [step.requests for step in records.steps] == [
        step.requests for step in earlier_records.steps
    ]
    assert len(records.evals) == len(earlier_records.evals)


def test_an_earlier_configuration_names_classes_that_have_moved_since() -> None:
    for former, now in FORMER_PATHS.items():
        problems = Problems()
        assert resolve(former, "key", object, problems) is resolve(now, "key", object, problems)
        assert not problems.messages
        assert current_path(former) == now
        nodes = [{"suite": {"_target_": path}} for path in (former, now)]
        assert config_hash(nodes[0]) == config_hash(nodes[1])
        assert stable_name(former) == stable_name(now)
