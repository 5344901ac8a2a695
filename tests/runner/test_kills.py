"""Runs and trainings that are killed, and two processes on one run, in forks of one process."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.killing import SIGNALS, cases, trials
from tests.support.paths import ROOT

TRIALS, TOGETHER = 100, 12

KILLING = (sys.executable, "-m", "tests.support.killing")


def test_trials_cover_every_allowed_pair_and_every_signal() -> None:
    chosen = cases()
    names = {case.name for case in chosen}
    assert {
        f"{editor}-none" for editor in ("alphaedit", "d4s", "ft", "memit", "mend", "rome")
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
