"""The launchers without a sweep: the slots of local GPUs, the options of sbatch, and overrides that
are deferred to the cells.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from editkit.cli.run import defer_component_values
from editkit.errors import ConfigError
from editkit.sweeps.local_gpus import default_threads, devices_of, last_error

# --- the slots of local_gpus


def test_slots_are_the_visible_gpus_or_the_requested_number() -> None:
    assert devices_of(None, "cuda", {"CUDA_VISIBLE_DEVICES": "2,5"}) == ["2", "5"]
    assert devices_of(1, "cuda", {"CUDA_VISIBLE_DEVICES": "2,5"}) == ["2"]
    assert devices_of([1, 3], "cuda", {}) == ["1", "3"]
    assert devices_of(3, "cpu", {}) == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("gpus", "device", "visible", "message"),
    [
        (
            None,
            "cuda:1",
            {},
            "assigns the devices (got 'cuda:1'; expected cuda). Fix: set runtime.device=cuda.",
        ),
        (
            None,
            "cpu",
            {},
            "runtime.device: hydra/launcher=local_gpus needs GPUs (got 'cpu'; expected cuda). "
            "Fix: choose runtime=cuda, or set hydra.launcher.gpus=<number of processes>.",
        ),
        (0, "cuda", {}, "hydra.launcher.gpus: out of range (got 0; expected at least 1,"),
        (
            3,
            "cuda",
            {"CUDA_VISIBLE_DEVICES": "0,1"},
            "hydra.launcher.gpus: CUDA_VISIBLE_DEVICES shows 2 GPUs (got 3; expected at most 2)",
        ),
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


def test_the_error_of_a_job_is_its_config_error_or_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a table\nConfigError: 2 problems\n  - one\n  - two\n")
    assert last_error(tmp_path / "log") == "ConfigError: 2 problems - one - two"
    (tmp_path / "log").write_text("Traceback\n  File\nValueError: no\n\n")
    assert last_error(tmp_path / "log") == "ValueError: no"
    (tmp_path / "log").write_text("")
    assert last_error(tmp_path / "log") == ""


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
    options = {name: value for name, value in config.hydra.launcher.items() if name != "_target_"}
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
    assert not [option for option in wanted if option not in text], text


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


# --- overrides of components


def test_only_values_of_components_in_a_multirun_are_deferred_to_the_cells() -> None:
    overrides = [
        "restraint=rect,prune",
        "restraint.prune.alpha=1.6",
        "editor.context_lengths=[[5,2]]",
        "editor.layers=[1],[2]",
        "seed=1",
    ]
    assert defer_component_values(overrides) == overrides
    left = [
        "restraint=rect,prune",
        "restraint.prune.alpha=choice(1.6)",
        "editor.context_lengths=choice([[5,2]])",
    ]
    assert defer_component_values(["-m", *overrides]) == [
        "-m",
        *left,
        "editor.layers=[1],[2]",
        "seed=1",
    ]
    assert defer_component_values(["sweep=restraints", *overrides])[2] == left[1]
    assert defer_component_values(["-m", "editor.covariance=null"]) == [
        "-m",
        "editor.covariance=null",
    ], "which Hydra does not take as a choice"
