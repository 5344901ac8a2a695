"""Runs and trainings that are killed, and two processes on one run, in forks of one process."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from editkit.runner.checkpoint import RunState, load_state
from tests.support.killing import SIGNALS, cases, trials
from tests.support.paths import ROOT

TRIALS, TOGETHER = 100, 12

KILLING = (sys.executable, "-m", "tests.support.killing")


@pytest.mark.slow
def test_trials_cover_every_allowed_pair_and_every_signal() -> None:
    chosen = cases()
    names = {case.name for case in chosen}
    assert {
        f"{editor}-none"
        for editor in (
            *("adalora", "alphaedit", "crispedit", "d4s", "emmet", "ft", "grace", "kn"),
            *("locft", "lora", "lora_merged", "malmen", "memit", "memoe", "memoir"),
            *("mend", "pmet", "rledit", "rome", "t_patcher", "ultraedit", "wise"),
        )
    } < names
    for place in ("eac", "d4s", "rect", "prune"):
        assert any(name.endswith(f"-{place}") for name in names), place
    made = trials(chosen, TRIALS, seed=0)
    assert {trial.case.name for trial in made} == names
    kills = [kill for trial in made for kill in trial.kills]
    assert (
        {kill.number for kill in kills}
        == {*SIGNALS}
        == {signal.SIGKILL, signal.SIGTERM, signal.SIGINT}
    )
    assert {kill.inside for kill in kills} == {
        None,
        "statistics",
        "evaluation",
        "writing",
        "training",
    }


@pytest.mark.slow
def test_a_few_kills_in_the_slow_tests() -> None:
    """`make test-kill` has the rest."""
    done = subprocess.run(
        [
            *KILLING,
            "--trials",
            "4",
            "--together",
            "2",
            "--seed",
            "1",
            "--jobs",
            "1",
            "--only",
            "memit",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def with_threads(number: int, folder: Path) -> tuple[RunState, list[dict[str, Any]]]:
    """The end of a run on so many threads: its state, and its evaluations."""
    quick = ["editor.target.steps=5", "editor.context_lengths=[[4,2]]", "stats.num_documents=500"]
    places = [f"paths.outputs={folder / str(number)}", f"stats.folder={folder / f'stats{number}'}"]
    given = ["editor=memit", "edits=6", "suite=none", "tracker=none", f"runtime.threads={number}"]
    subprocess.run(
        [sys.executable, "-m", "editkit", "run", *given, *quick, *places],
        check=True,
        capture_output=True,
        timeout=600,
    )
    (run,) = (folder / str(number)).glob("*/*/seed0")
    lines = (run / "evals.jsonl").read_text().splitlines()
    return load_state(run / "state"), [json.loads(line) for line in lines]


@pytest.mark.slow
def test_another_number_of_threads_changes_last_digits_and_nothing_else(tmp_path: Path) -> None:
    (one, evals), (two, others) = with_threads(1, tmp_path), with_threads(2, tmp_path)
    assert one.contexts == two.contexts and one.inputs["model"] == two.inputs["model"]
    for module, total in one.totals.items():
        difference = two.totals[module].dense() - total.dense()
        assert float(difference.norm() / total.dense().norm()) < 1e-3
    assert len(evals) == len(others)
    for record, other in zip(evals, others, strict=True):
        assert record.keys() == other.keys()
        for key, value in record.items():
            assert other[key] == (
                pytest.approx(value, rel=1e-2, abs=1e-3) if isinstance(value, float) else value
            )


@pytest.mark.kill
def test_killed_runs_and_trainings_become_what_undisturbed_ones_are(tmp_path: Path) -> None:
    done = subprocess.run(
        [*KILLING, "--trials", str(TRIALS), "--together", str(TOGETHER)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        len(re.findall(r"^trial .*: the same \(", done.stdout, re.MULTILINE)) == TRIALS + TOGETHER
    )
