"""Sweeps as a person starts them: in one process, on cores, one process a GPU; with failures, stops
and a second try.
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

import pytest
import torch

from editkit.cli.run import left_to_the_cells
from editkit.errors import ConfigError
from editkit.records.writer import EVALS, STEPS
from editkit.runner.checkpoint import load_state
from editkit.runner.lock import locked
from editkit.sweeps.local_gpus import default_threads, devices_of, last_words
from editkit.sweeps.state import look

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


def values(folder: Path, view: str) -> list[dict]:
    """The measurements of a view, without its name."""
    found = (json.loads(line) for line in (folder / EVALS).read_text().splitlines())
    return [{**each, "view": None} for each in found if each["view"] == view]


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
    assert "4 done, 0 running, 0 failed, 0 cut off, 0 missing of 4 cells" in both.stdout
    before = finished_at(tmp_path)

    again = sweep(tmp_path, "restraint=none,prune_linear", "seed=1,2", "hydra/launcher=joblib")
    assert (
        again.returncode == 0
        and "0 jobs to do" in again.stdout
        and "2 runs done before: skipped" in again.stdout
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
def test_a_failed_cell_stops_no_other_and_is_tried_again_only_when_told(tmp_path: Path) -> None:
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
    assert "1 done, 0 running, 1 failed, 0 cut off, 0 missing of 2 cells" in first.stdout
    assert "failed: cell 0 (suite.when=2): RuntimeError: the disk is full" in first.stdout
    assert re.search(
        r"0 +failed +2/4 +suite\.when=2 +RuntimeError: the disk is full", status(tmp_path)
    )

    (tmp_path / "broken").unlink()
    left = sweep(tmp_path, *arguments, options=own)
    assert (
        left.returncode == 1
        and "1 run failed before: left alone (retry_failed=true tries again)" in left.stdout
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
    assert "the views of one run are tried apart" in done.stdout
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
def test_a_stopped_sweep_saves_and_the_same_command_goes_on(launcher: str, tmp_path: Path) -> None:
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
        (look(path).step or 0) >= 2 for path in runs(tmp_path)
    ):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output.decode()
    stopped = [look(path) for path in runs(tmp_path)]
    assert all(each.state in ("cut off", "missing") for each in stopped), "nothing is left running"
    assert all(each.step == each.saved_step for each in stopped if each.step)
    assert "goes on after step" in output.decode()
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
    assert [each["device"] for each in outcomes[:2]] == ["0", "1"], "a slot each for the first two"
    assert outcomes[2]["device"] in ("0", "1"), "and the third takes the one that is free first"
    assert [
        json.loads((path / "provenance.json").read_text())["visible_devices"]
        for path in runs(tmp_path)
    ] == [each["device"] for each in outcomes]
    assert len({each["pid"] for each in outcomes}) == 3


@pytest.mark.slow
def test_a_cell_that_another_process_has_is_left_to_it_and_the_others_go_on(tmp_path: Path) -> None:
    assert sweep(tmp_path, "seed=1").returncode == 0
    (first,) = runs(tmp_path)
    (first / "DONE").unlink()
    with locked(first):
        busy = sweep(tmp_path, "seed=1,2")
    assert busy.returncode == 3, busy.stdout + busy.stderr
    assert "1 run being written by another process" in busy.stdout
    assert sweep(tmp_path, "seed=1,2").returncode == 0


# --- the slots of local_gpus


def test_slots_are_the_visible_gpus_or_as_many_as_were_asked_for() -> None:
    assert devices_of(None, "cuda", {"CUDA_VISIBLE_DEVICES": "2,5"}) == ["2", "5"]
    assert devices_of(1, "cuda", {"CUDA_VISIBLE_DEVICES": "2,5"}) == ["2"]
    assert devices_of([1, 3], "cuda", {}) == ["1", "3"]
    assert devices_of(3, "cpu", {}) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("gpus", "device", "visible", "message"),
    [
        (None, "cuda:1", {}, "assigns the devices: runtime.device=cuda"),
        (
            None,
            "cpu",
            {},
            "runtime.device is cpu; runtime=cuda, or say hydra.launcher.gpus=<number>",
        ),
        (0, "cuda", {}, "hydra.launcher.gpus: 0 was given; at least 1"),
        (3, "cuda", {"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES shows 2"),
    ],
)
def test_slots_that_cannot_be_are_a_mistake(
    gpus: int | None, device: str, visible: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        devices_of(gpus, device, visible)


def test_the_cores_are_shared_by_the_slots() -> None:
    cores = len(os.sched_getaffinity(0))
    assert default_threads(1) == cores and default_threads(10 * cores) == 1


def test_a_jobs_last_words_are_its_mistake_or_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a table\nConfigError: 2 problems\n  - one\n  - two\n")
    assert last_words(tmp_path / "log") == "ConfigError: 2 problems - one - two"
    (tmp_path / "log").write_text("Traceback\n  File\nValueError: no\n\n")
    assert last_words(tmp_path / "log") == "ValueError: no"
    (tmp_path / "log").write_text("")
    assert last_words(tmp_path / "log") == ""


# --- Slurm, as far as it goes without one


@pytest.mark.parametrize("preset", ["slurm", "slurm_gpu"])
def test_a_preset_of_slurm_becomes_the_options_of_sbatch(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from editkit.config.compose import ROOT, conf_folder
    from editkit.sweeps.slurm import SlurmLauncher

    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    overrides = [
        f"hydra/launcher={preset}",
        "hydra.launcher.partition=p",
        "hydra.launcher.timeout_min=90",
        "hydra.sweep.dir=s",
    ]
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = hydra.compose(ROOT, overrides=overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    options = {name: each for name, each in config.hydra.launcher.items() if name != "_target_"}
    options["submitit_folder"] = str(tmp_path / "logs" / "%j")
    text = (
        SlurmLauncher(**options)._executor()._executor._make_submission_file_text("COMMAND", "id")
    )
    wanted = [
        "--partition=p",
        "--time=90",
        "--requeue",
        "--job-name=editkit-default",
        "srun --unbuffered",
    ]
    wanted += (
        ["--signal=USR2@300", "--gpus-per-node=1", "--mem=64GB"]
        if preset == "slurm_gpu"
        else ["--signal=USR2@120", "--mem=16GB"]
    )
    assert not [each for each in wanted if each not in text], text


def test_without_slurm_the_launcher_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    from editkit.sweeps.slurm import SlurmLauncher

    monkeypatch.setenv("PATH", str(tmp_path))
    launcher = SlurmLauncher(
        submitit_folder=str(tmp_path / "%j"), detach=False, poll_s=1, max_num_timeout=1, name="n"
    )
    with pytest.raises(ConfigError, match="srun"):
        launcher._executor()


@pytest.mark.slow
def test_a_value_of_what_is_swept_reaches_the_cells_that_have_it_and_no_other_stops_them(
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


def test_only_values_of_components_and_only_in_a_multirun_are_left_to_the_cells() -> None:
    asked = [
        "restraint=rect,prune",
        "restraint.prune.alpha=1.6",
        "editor.context_lengths=[[5,2]]",
        "editor.layers=[1],[2]",
        "seed=1",
    ]
    assert left_to_the_cells(asked) == asked
    left = [
        "restraint=rect,prune",
        "restraint.prune.alpha=choice(1.6)",
        "editor.context_lengths=choice([[5,2]])",
    ]
    assert left_to_the_cells(["-m", *asked]) == ["-m", *left, "editor.layers=[1],[2]", "seed=1"]
    assert left_to_the_cells(["sweep=restraints", *asked])[2] == left[1]
    assert left_to_the_cells(["-m", "editor.covariance=null"]) == [
        "-m",
        "editor.covariance=null",
    ], "which Hydra does not take as a choice"
