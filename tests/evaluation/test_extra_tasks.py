"""editkit without the packages of the extra `tasks`: one message each where they are needed, and
none elsewhere.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from editkit.evaluation.harness.catalogue import PACKAGES
from tests.support.paths import ROOT


def editkit_without(
    packages: list[str], arguments: list[str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """`editkit` in an interpreter in which importing these packages fails."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({packages!r}))
sys.argv = ['editkit', *{arguments!r}]
from editkit.cli.main import main
try:
    main()
finally:
    loaded = {{'torch', 'transformers'}} & sys.modules.keys()
    sys.stderr.write(f'LOADED {{sorted(loaded)}}')
"""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("command", ["validate", "run"])
def test_tasks_without_the_harness_are_refused_before_the_model_loads(
    command: str, tmp_path: Path
) -> None:
    done = editkit_without(["lm_eval"], [command, "edits=3"], tmp_path)
    assert done.returncode == 2, done.stderr
    assert (
        "suite: the tasks need lm-evaluation-harness, not installed here (got 'world'). "
        "Fix: pip install 'editkit[tasks]', or choose suite=none." in done.stderr
    )
    assert "LOADED []" in done.stderr and not (tmp_path / "outputs").exists()


def test_every_missing_package_is_named(tmp_path: Path) -> None:
    done = editkit_without(list(PACKAGES), ["validate", "edits=3"], tmp_path)
    assert "the tasks need lm-evaluation-harness, nltk, rouge, rouge-score, not" in done.stderr


def test_fluency_without_nltk_is_refused(tmp_path: Path) -> None:
    arguments = ["validate", "edits=3", "suite=none", "evaluation.fluency.limit=2"]
    done = editkit_without(["nltk"], arguments, tmp_path)
    assert done.returncode == 2, done.stderr
    assert (
        "evaluation.fluency.limit: the entropy of generated texts needs nltk, not installed here "
        "(got 2; expected 0). Fix: pip install 'editkit[tasks]', or set evaluation.fluency.limit=0."
        in done.stderr
    )


@pytest.mark.slow
def test_a_run_without_tasks_needs_none_of_the_packages(tmp_path: Path) -> None:
    arguments = ["run", "edits=1", "milestones=[1]", "suite=none", "tracker=none"]
    done = editkit_without(list(PACKAGES), arguments, tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_extra_holds_exactly_these_packages_and_dev_includes_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    names = {line.partition(">")[0].replace("-", "_") for line in extras["tasks"]}
    assert names == PACKAGES.keys()
    assert not any(line.startswith((*PACKAGES, "rouge-")) for line in project["dependencies"])
    (included,) = [line for line in extras["dev"] if line.startswith("editkit[")]
    assert "tasks" in included
