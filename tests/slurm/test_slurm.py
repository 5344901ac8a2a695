"""On a real Slurm: a pre-empted job saves and goes on, a killed one is taken up again, and nobody
can tell from the results.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from editkit.records.writer import EVALS, STEPS
from editkit.runner.checkpoint import load_state
from editkit.runner.lock import holder_of, is_locked
from editkit.sweeps.plan import load_plan
from editkit.sweeps.state import last_step, read_status
from tests.slurm.cluster import Cluster, missing, running, wait_for
from tests.support.paths import ROOT

pytestmark = pytest.mark.slurm

EDITS, CHECKPOINT = 50, 15
GRID = ("editor=rome,memit", "seed=1,2")
CELL = (
    *(
        "model=tiny-gpt2",
        "restraint=none",
        "dataset=world",
        "suite=none",
        "runtime.threads=1",
        "stats.num_documents=2000",
    ),
    *(
        "editor.target.steps=4",
        f"edits={EDITS}",
        f"milestones=[0,{EDITS}]",
        f"checkpoint.every={CHECKPOINT}",
    ),
)
SLOW = ("--config-dir", str(Path(__file__).with_name("conf")), "tracker=slow")
SLURM = (
    "hydra.launcher.partition=low",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.mem_gb=1",
    "hydra.launcher.poll_s=1",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(f"no Slurm: {reason}")
    with running(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def editkit(
    folder: Path, *arguments: str, cluster: Cluster | None = None, outputs: str = "outputs"
) -> subprocess.CompletedProcess[str]:
    environment = {**(cluster.environment if cluster else os.environ), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    where = (
        [f"paths.outputs={outputs}", "stats.folder=statistics"]
        if arguments[0] in ("run", "submit", "stats")
        else []
    )
    options = [each for each in arguments if each == "--detach"]
    command = [
        sys.executable,
        "-m",
        "editkit",
        *(each for each in arguments if each not in options),
        *where,
        *options,
    ]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def runs_below(outputs: Path) -> dict[str, Path]:
    return {
        str(path.parent.relative_to(outputs)): path.parent
        for path in sorted(outputs.glob("*/*/seed*/.lock"))
    }


def records(folder: Path, name: str) -> list[dict]:
    """The lines of a record file without what a clock measured."""
    return [
        {**json.loads(line), "seconds": None} for line in (folder / name).read_text().splitlines()
    ]


def in_work(outputs: Path, least: int = 3) -> list[Path]:
    """Runs that are being written and have made a few edits."""
    return [
        folder
        for folder in runs_below(outputs).values()
        if is_locked(folder) and (last_step(folder / STEPS) or 0) >= least
    ]


def facts(folder: Path) -> dict:
    return json.loads((folder / "provenance.json").read_text())


def test_preempted_and_killed_jobs_end_as_if_undisturbed(cluster: Cluster, tmp_path: Path) -> None:
    undisturbed = editkit(
        tmp_path, "run", "--multirun", *GRID, *CELL, "tracker=none", outputs="undisturbed"
    )
    assert undisturbed.returncode == 0, undisturbed.stderr
    outputs = tmp_path / "outputs"

    submitted = editkit(
        tmp_path, "submit", "--detach", *SLOW, *GRID, *CELL, *SLURM, cluster=cluster
    )
    assert submitted.returncode == 0, submitted.stderr
    array = re.search(r"Slurm job (\d+): 4 jobs", submitted.stdout)
    assert array, "detached: the array is there, and nobody waits for it"
    assert sorted(cluster.jobs()) == [f"{array[1]}_{task}" for task in range(4)]

    # A job of a partition that goes first sends one away.
    wait_for(lambda: len(in_work(outputs)) == 2, "two runs at work", seconds=240)
    before = set(in_work(outputs))
    cluster.ask("sbatch", "--partition=high", "--output=/dev/null", "--wrap", "sleep 10")
    wait_for(
        lambda: any(not is_locked(folder) for folder in before),
        "a run that was sent away",
        seconds=120,
    )
    (preempted,) = (folder for folder in before if not is_locked(folder))
    left = read_status(preempted)
    assert left.state == "interrupted"
    assert left.step == left.saved_step and 0 < (left.step or 0) < EDITS, (
        "saved at the end of the edit at hand: nothing is made again"
    )

    # SIGKILL, some edits after a checkpoint.
    def to_kill() -> list[Path]:
        return [
            folder
            for folder in in_work(outputs, CHECKPOINT + 2)
            if folder != preempted and (read_status(folder).saved_step or 0) >= CHECKPOINT
        ]

    wait_for(lambda: bool(to_kill()), "a run that is past a checkpoint", seconds=240)
    killed = to_kill()[0]
    os.kill(holder_of(killed)["pid"], signal.SIGKILL)

    def all_gone() -> bool:
        cluster.release()
        return not [
            state
            for state in cluster.jobs().values()
            if state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
        ]

    wait_for(all_gone, "the end of the array", seconds=420, every=1)
    (sweep,) = (path.parent for path in outputs.glob("multirun/*/cells.json"))
    assert read_status(killed).state == "interrupted"
    shown = editkit(tmp_path, "status", str(sweep))
    assert "3 done, 0 running, 0 failed, 1 interrupted, 0 missing of 4 cells" in shown.stdout, (
        shown.stdout + cluster.told()
    )

    # The same again, waiting this time: one cell is left to do.
    again = editkit(tmp_path, "submit", *SLOW, *GRID, *CELL, *SLURM, cluster=cluster)
    assert again.returncode == 0, again.stdout + again.stderr
    assert (
        "4 cells in 4 runs: 1 job to do" in again.stdout
        and "3 runs already done: skipped" in again.stdout
    )
    assert "4 done, 0 running, 0 failed, 0 interrupted, 0 missing of 4 cells" in again.stdout

    assert facts(preempted)["sessions"] == 2 and facts(preempted)["steps_made_again"] == 0
    assert 0 < facts(killed)["steps_made_again"] <= CHECKPOINT
    untouched = [
        folder for folder in runs_below(outputs).values() if folder not in (preempted, killed)
    ]
    assert [facts(folder)["sessions"] for folder in untouched] == [1, 1], (
        "a cell that was done is not computed again"
    )
    theirs = runs_below(tmp_path / "undisturbed")
    assert runs_below(outputs).keys() == theirs.keys() and len(theirs) == 4
    for name, folder in runs_below(outputs).items():
        for file in (STEPS, EVALS):
            assert records(folder, file) == records(theirs[name], file), f"{name}/{file}"
        ours, other = load_state(folder / "state"), load_state(theirs[name] / "state")
        assert ours.step == other.step == EDITS
        for module, total in ours.totals.items():
            assert torch.equal(total.dense(), other.totals[module].dense()), name
    sys.stderr.write(
        f"Slurm: pre-empted after edit {left.step}, made again 0; killed, made again {facts(killed)['steps_made_again']} of {EDITS}; "
        f"cells computed again from the start: 0 of {len(load_plan(sweep).cells)}\n"
    )


def test_a_job_at_its_time_limit_saves_and_is_requeued_and_a_cancelled_one_is_not(
    cluster: Cluster, tmp_path: Path
) -> None:
    limit = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=30")
    long = [each for each in CELL if not each.startswith(("edits=", "milestones=", "checkpoint"))]
    length = ("edits=1000", "milestones=[0]", "checkpoint.every=500")
    built = editkit(
        tmp_path, "stats", "build", "editor=rome", *long
    )  # so that the job comes as far as its edits
    assert built.returncode == 0, built.stderr
    submitted = editkit(
        tmp_path,
        "submit",
        *SLOW,
        "editor=rome",
        *long,
        *length,
        *SLURM,
        *limit,
        "--detach",
        cluster=cluster,
    )
    assert submitted.returncode == 0, submitted.stderr
    found = re.search(r"Slurm job (\d+): 1 job,", submitted.stdout)
    assert found
    job, outputs = found[1], tmp_path / "outputs"
    wait_for(
        lambda: cluster.jobs()[job] == "PENDING" and bool(runs_below(outputs)),
        "a requeue at the time limit",
        seconds=200,
    )
    (folder,) = runs_below(outputs).values()
    left = read_status(folder)
    assert (
        left.state == "interrupted" and left.step == left.saved_step and 0 < (left.step or 0) < 500
    ), left

    cluster.ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # once is enough here

    def goes_on() -> bool:
        cluster.release()
        return (read_status(folder).step or 0) > (left.step or 0)

    wait_for(goes_on, "the requeued job to go on", seconds=240, every=1)
    cluster.ask("scancel", job)
    wait_for(lambda: cluster.jobs()[job] == "CANCELLED", "the end of the cancelled job", seconds=60)
    assert not is_locked(folder)
    assert (read_status(folder).step or 0) == (read_status(folder).saved_step or 0), (
        "it saves before it goes, and does not come back"
    )
