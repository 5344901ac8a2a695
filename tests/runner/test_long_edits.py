"""A long run that is killed and resumed: nothing grows with its edits (`scripts/long_edits.py`)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from editkit.records.reader import load_run
from tests.support.paths import ROOT


@pytest.mark.slow
def test_a_run_of_two_thousand_edits_keeps_its_memory_its_time_and_its_checkpoints(
    tmp_path: Path,
) -> None:
    script = [sys.executable, str(ROOT / "scripts/long_edits.py"), "--to", str(tmp_path)]
    sizes = ["--edits", "2000", "--batch", "50", "--kills", "1", "--measured", "40"]
    overrides = ["evaluation.protocols=[probability]", "milestones=[0,2000]"]
    subprocess.run([*script, *sizes, *overrides], check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["edits"], summary["nonfinite_steps"]) == (2000, 0)
    assert len(summary["killed_at_steps"]) == 1
    memory = summary["resident_bytes"]
    assert memory["last"] < 1.1 * memory["after_a_tenth"]
    assert len(set(summary["checkpoint_bytes"].values())) == 1
    first, last = (summary["cpu_seconds_an_edit"][end] for end in ("first", "last"))
    assert last < 2 * first, "a loaded machine's noise; work that grows with the edits is far more"
    assert set(summary["by_edits"]) == {"0", "2000"}
    (folder,) = tmp_path.glob("outputs/*/*/seed0")
    run = load_run(folder)
    assert [step.step for step in run.steps] == list(range(41)), "no step is lost or repeated"
    figures = [step.step for step in run.steps if step.modules]
    assert figures == list(range(41)), "telemetry.every is 1 at this length"
