"""`python -m editkit.lm_eval`: the harness's own command line on the model of a run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import editkit
from editkit.errors import ConfigError
from editkit.lm_eval.__main__ import from_arguments, main, register
from tests.support.paths import PACKAGE

pytest.importorskip("lm_eval", reason="lm_eval is not installed: the extra 'tasks'")
TASKS = {"world_arithmetic": "solve_rate", "world_entailment": "accuracy"}
EDITS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose edits cost abilities, and whose restrained view has other ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        records = editkit.run(
            *("editor.norm_constraint=1.0", "editor.lr=0.2", "suite.limit=10"),
            *(f"milestones=[{EDITS}]", "tracker=none"),
            model="tiny-gpt2",
            editor="ft",
            restraint="prune",
            edits=EDITS,
            suite="world",
        )
        return records.folder.absolute()


@pytest.mark.slow
@pytest.mark.parametrize("view", ["unrestrained", "prune"])
def test_the_harness_has_the_numbers_of_the_run(run: Path, view: str) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    register()
    results = simple_evaluate(
        model="editkit",
        model_args=f"run={run},view={view},step={EDITS}",
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(PACKAGE / "evaluation" / "tasks")),
        limit=10,
        device="cpu",
    )
    assert results is not None
    records = editkit.load_run(run)
    lost = 0.0
    for task, metric in TASKS.items():
        before, after = (
            records.value(
                step=step,
                view=view,
                kind="downstream",
                task=task.removeprefix("world_"),
                metric=metric,
            )
            for step in (0, EDITS)
        )
        assert results["results"][task][f"{metric},none"] == pytest.approx(after, abs=1e-12)
        lost += before - after
    assert view == "prune" or lost > 0  # else the test would show nothing


def test_wrong_arguments_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        from_arguments({"folder": "x", "step": "last"}, device="cpu")
    text = str(error.value)
    assert "model_args.folder: unknown (expected one of run, view, step" in text
    assert "model_args.run: not given" in text and "model_args.step: not a number" in text


@pytest.mark.slow
def test_a_step_without_a_checkpoint_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match=rf"model_args\.step: .*expected {EDITS}, the newest"):
        from_arguments({"run": str(run), "step": 1}, device="cpu")


@pytest.mark.slow
def test_an_invalid_command_ends_with_2(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--model", "editkit", "--model_args", f"run={run},view=rect"]
    words += [
        "--include_path",
        str(PACKAGE / "evaluation" / "tasks"),
        "--tasks",
        "world_entailment",
    ]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    assert main() == 2
    assert "the run has no such view (got 'rect'" in capsys.readouterr().err
