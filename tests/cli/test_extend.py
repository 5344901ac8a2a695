"""Adding an editor, a restraint, a dataset or an evaluator takes one file and one yaml, anywhere:
the examples of docs/extending.md, run as a user would.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PAGE = Path(os.environ.get("EDITKIT_EXTENDING", ROOT / "docs/extending.md"))
FILES = {  # by the option's group: the yaml and the module
    "editor": ("conf/editor/mine.yaml", "mine.py"),
    "restraint": ("conf/restraint/halve.yaml", "halve.py"),
    "dataset": ("conf/dataset/pairs.yaml", "pairs.py"),
    "suite": ("conf/suite/capitals.yaml", "capitals.py"),
}
PAIRS = (
    "Ann Lee\t{} lives in\tRome\nBen Ode\tThe home of {} is\tParis\nCid Pan\t{} was born in\tOslo\n"
)


def example(language: str, name: str) -> str:
    """The page's code block whose first line names this file."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (code,) = [block for block in blocks if block.startswith(f"# {name}")]
    return str(code)


@pytest.mark.slow
def test_a_users_editor_restraint_dataset_and_task_run_from_an_empty_folder(
    tmp_path: Path,
) -> None:
    for yaml_name, module_name in FILES.values():
        (tmp_path / yaml_name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / yaml_name).write_text(example("yaml", yaml_name))
        (tmp_path / module_name).write_text(example("python", module_name))
    (tmp_path / "pairs.tsv").write_text(PAIRS)
    commands = re.findall(r"^editkit (run .*)$", PAGE.read_text(), flags=re.MULTILINE)
    (line,) = [command for command in commands if "editor=mine" in command]
    command = [sys.executable, "-m", "editkit", *shlex.split(line)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("outputs/default/tiny-gpt2-mine-halve+prune-*/seed0")
    steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert steps[1]["requests"] == ["pairs/0"]
    (figures,) = steps[3]["modules"].values()
    assert figures["update_frobenius"] > 0
    evaluations = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    tasks = {
        (record["view"], record["task"]): record["value"]
        for record in evaluations
        if record.get("suite") == "capitals"
    }
    assert {"unrestrained", "prune"} == {view for view, _ in tasks} and all(
        0 < value < 1 for value in tasks.values()
    )
    assert (folder / "DONE").exists()
