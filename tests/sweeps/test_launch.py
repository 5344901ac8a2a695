"""Sweeps as a user starts them: in one process, on several cores, one process per GPU, with
failures, stops and retries.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.records.writer import EVALS, STEPS
from editkit.runner.checkpoint import load_state
from editkit.runner.lock import locked
from editkit.sweeps.state import read_status

RUN = (
    *(
        "model=tiny-gpt2",
        "editor=rome",
        "dataset=world",
        "suite=none",
        "tracker=none",
        "runtime.threads=1",
    ),
    *(
        "edits=4",
        "milestones=[0,4]",
        "checkpoint.every=1",
        "editor.context_lengths=[[5,2]]",
        "editor.target.steps=3",
    ),
    "stats.num_documents=2000",
)


def command(*arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "editkit",
        *arguments,
        "paths.outputs=outputs",
        "stats.folder=statistics",
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def sweep(
    folder: Path, *arguments: str, options: tuple[str, ...] = (), may_crash: bool = False
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command("run", "--multirun", *options, *RUN, *arguments),
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert may_crash or "Traceback" not in done.stderr, done.stderr
    return done


def status(folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "editkit", "status"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout


def runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("outputs/default/*/seed*"))


def values(folder: Path, view: str) -> list[dict[str, Any]]:
    """The measurements of a view, without its name."""
    records = (json.loads(line) for line in (folder / EVALS).read_text().splitlines())
    return [{**record, "view": None} for record in records if record["view"] == view]


def finished_at(folder: Path) -> dict[Path, int]:
    return {path: (path / "provenance.json").stat().st_mtime_ns for path in runs(folder)}


@pytest.mark.slow
def test_views_share_a_run_bit_for_bit_and_done_cells_are_not_computed_again(
    tmp_path: Path,
) -> None:
    both = sweep(tmp_path, "restraint=none,prune_linear", "seed=1,2")
    assert both.returncode == 0, both.stderr
    assert "4 cells in 2 runs: 2 jobs to do" in both.stdout
    assert (
        "views of one trajectory share its run: unrestrained + prune_linear (2 runs)" in both.stdout
    )
    assert "4 done, 0 running, 0 failed, 0 interrupted, 0 missing of 4 cells" in both.stdout
    before = finished_at(tmp_path)

    again = sweep(tmp_path, "restraint=none,prune_linear", "seed=1,2", "hydra/launcher=joblib")
    assert (
        again.returncode == 0
        and "0 jobs to do" in again.stdout
        and "2 runs already done: skipped" in again.stdout
    )
    assert finished_at(tmp_path) == before

    assert sweep(tmp_path, "restraint=none", "seed=1").returncode == 0
    alone = next(path for path in runs(tmp_path) if path not in before)
    shared = next(path for path in before if path.name == "seed1")
    assert values(alone, "unrestrained") == values(shared, "unrestrained") and values(
        shared, "prune_linear"
    )
    ours, theirs = load_state(alone / "state"), load_state(shared / "state")
    assert all(
        torch.equal(total.dense(), theirs.totals[module].dense())
        for module, total in ours.totals.items()
    )


@pytest.mark.slow
def test_a_failed_cell_stops_no_other_and_is_retried_only_on_request(tmp_path: Path) -> None:
    (tmp_path / "conf/suite").mkdir(parents=True)
    (tmp_path / "conf/suite/falls.yaml").write_text("# Falls\n_target_: falls.Falls\nwhen: 2\n")
    (tmp_path / "falls.py").write_text(
        "from dataclasses import dataclass\nfrom pathlib import Path\nfrom editkit.evaluation.base import AbstractEvaluator\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Falls(AbstractEvaluator):\n    when: int\n"
        "    def baseline(self, model, requests): return {}\n"
        "    def evaluate(self, model, requests, baseline):\n"
        "        if Path('broken').exists() and len(requests) == self.when: raise RuntimeError('the disk is full')\n        return ()\n"
    )
    (tmp_path / "broken").touch()
    arguments = (
        "suite=falls",
        "suite.when=2,5",
        "milestones=[2,4]",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
    )
    own = ("--config-dir", "conf")
    first = sweep(tmp_path, *arguments, options=own, may_crash=True)
    assert first.returncode == 1
    counts = "1 done, 0 running, 1 failed, 0 interrupted, 0 missing of 2 cells"
    assert counts in first.stdout, f"{first.stdout}\n{first.stderr}"
    assert "failed: cell 0 (suite.when=2): RuntimeError: the disk is full" in first.stdout
    assert re.search(
        r"0 +failed +2/4 +suite\.when=2 +RuntimeError: the disk is full", status(tmp_path)
    )

    (tmp_path / "broken").unlink()
    left = sweep(tmp_path, *arguments, options=own)
    assert (
        left.returncode == 1
        and "1 run failed before: skipped (retry_failed=true retries)" in left.stdout
    )
    told = sweep(tmp_path, *arguments, "retry_failed=true", options=own)
    assert told.returncode == 0 and "2 done, 0 running, 0 failed" in told.stdout


@pytest.mark.slow
def test_a_view_that_its_matrices_forbid_does_not_take_its_trajectory_with_it(
    tmp_path: Path,
) -> None:
    options = tmp_path / "conf" / "restraint"
    options.mkdir(parents=True)
    node = "{_target_: editkit.restraints.prune.Prune, function: log, alpha: 1.2, apply_at: evaluation, every: null, allow_amplify: false}"
    (options / "strict.yaml").write_text(f"strict: {node}\n")
    done = sweep(tmp_path, "restraint=none,strict", options=("--config-dir", "conf"))
    assert done.returncode == 2
    assert "the views of a refused run are run separately" in done.stdout
    assert (
        "failed: cell 1 (restraint=strict): restraint.strict.alpha: F would enlarge" in done.stdout
    )
    assert done.stderr.count("F would enlarge") == 1, (
        "the run of both is not blamed for what one of them then says itself"
    )
    assert "1 done, 0 running, 1 failed" in done.stdout
    assert re.search(r"0 +done +4/4 +restraint=none", status(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "local_gpus"])
def test_a_stopped_sweep_saves_and_the_same_command_resumes_it(
    launcher: str, tmp_path: Path
) -> None:
    chosen = [
        f"hydra/launcher={launcher}",
        *(["hydra.launcher.gpus=2"] if launcher == "local_gpus" else []),
    ]
    arguments = ["run", "--multirun", *RUN, "seed=1,2,3", *chosen, "edits=40", "milestones=[0,40]"]
    process = subprocess.Popen(
        command(*arguments),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    while process.poll() is None and not any(
        (read_status(path).step or 0) >= 2 for path in runs(tmp_path)
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output.decode()
    stopped = [read_status(path) for path in runs(tmp_path)]
    assert all(status.state in ("interrupted", "missing") for status in stopped), (
        "nothing is left running"
    )
    assert all(status.step == status.saved_step for status in stopped if status.step)
    assert "resumes after step" in output.decode()
    done = subprocess.run(
        command(*arguments, "retry_failed=true"),
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 done" in done.stdout and "0 steps made again" in done.stdout
    assert [len((path / STEPS).read_text().splitlines()) for path in runs(tmp_path)] == [41, 41, 41]


@pytest.mark.slow
def test_one_process_a_gpu_each_with_the_device_of_its_slot(tmp_path: Path) -> None:
    done = sweep(tmp_path, "seed=1,2,3", "hydra/launcher=local_gpus", "hydra.launcher.gpus=2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 jobs on 2 slots" in done.stdout
    (folder,) = tmp_path.glob("outputs/multirun/*")
    outcomes = [json.loads((folder / "jobs" / f"{job}.json").read_text()) for job in range(3)]
    assert [outcome["device"] for outcome in outcomes[:2]] == ["0", "1"], (
        "a slot outcome for the first two"
    )
    assert outcomes[2]["device"] in ("0", "1"), "and the third takes the one that is free first"
    assert [
        json.loads((path / "provenance.json").read_text())["visible_devices"]
        for path in runs(tmp_path)
    ] == [outcome["device"] for outcome in outcomes]
    assert len({outcome["pid"] for outcome in outcomes}) == 3


@pytest.mark.slow
def test_a_cell_that_another_process_runs_is_skipped_and_the_others_continue(
    tmp_path: Path,
) -> None:
    assert sweep(tmp_path, "seed=1").returncode == 0
    (first,) = runs(tmp_path)
    (first / "DONE").unlink()
    with locked(first):
        busy = sweep(tmp_path, "seed=1,2")
    assert busy.returncode == 3, busy.stdout + busy.stderr
    assert "1 run being written by another process" in busy.stdout
    assert sweep(tmp_path, "seed=1,2").returncode == 0


@pytest.mark.slow
def test_a_value_of_a_swept_component_reaches_the_cells_that_have_its_key(
    tmp_path: Path,
) -> None:
    more = (
        "restraint=norm_cap,rect",
        "restraint.norm_cap.ratio=0.5",
        "edits=1",
        "milestones=[0,1]",
    )
    done = sweep(tmp_path, *more)
    assert done.returncode == 2
    assert (
        "restraint=rect" in done.stderr
        and "Could not override 'restraint.norm_cap.ratio'" in done.stderr
    )
    assert "1 done, 0 running, 1 failed" in done.stdout
    (folder,) = runs(tmp_path)
    assert "ratio: 0.5" in (folder / "config.yaml").read_text()
