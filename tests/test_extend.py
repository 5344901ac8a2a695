"""Adding an editor takes one file and one yaml, anywhere: the README's example, run as a user would run it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"


def example(language: str, name: str) -> str:
    """The README's code block whose first line names this file."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (found,) = [block for block in blocks if block.startswith(f"# {name}")]
    return found


def test_an_editor_of_ones_own_runs_from_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "conf" / "editor").mkdir(parents=True)
    (tmp_path / "mine.py").write_text(example("python", "mine.py"))
    (tmp_path / "conf" / "editor" / "mine.yaml").write_text(example("yaml", "conf/editor/mine.yaml"))
    choices = (
        "editor=mine",
        "model=tiny-gpt2",
        "suite=none",
        "tracker=none",
        "edits=3",
        "milestones=[3]",
        "restraint=prune",
        "restraint.prune.function=linear",
    )
    command = [sys.executable, "-m", "editkit", "run", "--config-dir", "conf", *choices]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("outputs/default/tiny-gpt2-mine-prune-*/seed0")
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    (figures,) = steps[3]["modules"].values()
    assert figures["update_frobenius"] > 0
    assert (folder / "DONE").exists()
