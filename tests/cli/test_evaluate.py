"""`editkit evaluate` measures somebody else's edited model as the run that edited it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from editkit.cli.evaluate import as_run
from editkit.cli.main import app
from editkit.cli.run import run
from editkit.errors import ConfigError
from editkit.records.reader import load_run
from editkit.report.labels import labels
from editkit.report.notes import notes_of
from editkit.runner.export import export

BASE = "asset:tiny-gpt2"


def composed_run(*arguments: str) -> list[str]:
    return as_run([*arguments])


def test_the_command_is_a_run_without_edits_whose_only_batch_has_them_all() -> None:
    assert composed_run("model=mine/edited", "base=tiny-gpt2", "edits=3", "base.dtype=float16") == [
        *("edits=3", "model=tiny-gpt2", "model.dtype=float16", "editor=none"),
        *("editor.edited=mine/edited", "batch_size=${edits}", "evaluation=full"),
        *("evaluation.timings=[milestone]", "milestones=[0,${edits}]"),
        "name=tiny-gpt2-edited",
    ]
    own = composed_run(
        "base=./a b", "model=gpt2-xl", "name=x", "evaluation=default", "--multirun", "seed=0,1"
    )
    assert own[:2] == ["--multirun", "name=x"] and "model=hf" in own and "model.id='./a b'" in own
    assert "editor.edited=gpt2-xl" in own or "editor.edited=openai-community/gpt2-xl" in own
    assert not any(each.startswith(("evaluation=full", "name=a")) for each in own)


def test_the_command_explains_itself() -> None:
    result = CliRunner().invoke(app, ["evaluate", "--help"])
    assert result.exit_code == 0 and "model=<edited> base=<original>" in result.output


def test_all_mistakes_of_the_command_are_reported_together() -> None:
    with pytest.raises(ConfigError) as raised:
        composed_run("model.dtype=float16", "editor=rome", "batch_size=2", "rollback=true")
    keys = [problem.partition(":")[0] for problem in raised.value.problems]
    assert keys == ["model", "base", "model.dtype", "editor", "batch_size", "rollback"]


@pytest.mark.slow
def test_the_exported_model_of_a_run_gives_the_numbers_of_that_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["edits=4", "suite=none", "tracker=none", "evaluation.protocols=[probability,argmax]"]
    assert run([*asked, "editor=ft", "milestones=[4]", "batch_size=2"]) == 0
    (edited,) = tmp_path.glob("outputs/default/*/seed0")
    export(edited, tmp_path / "edited")
    arguments = as_run(["model=edited", f"base={BASE}", "evaluation=default", *asked])
    assert run(arguments) == 0
    (measured,) = tmp_path.glob("outputs/default/tiny-gpt2-edited-*/seed0")

    def numbers(folder: Path) -> dict[Any, float | None]:
        records = load_run(folder)
        last = max(record.step for record in records.evals)
        return {
            (each.metric, each.protocol, each.task, each.subset, each.block): each.value
            for record in records.evals
            if record.step == last
            for each in [record.measurement]
        }

    assert numbers(measured) == numbers(edited) and len(numbers(edited)) > 8
    of_run, of_model = (load_run(folder).steps[-1].modules for folder in (edited, measured))
    assert of_run.keys() == of_model.keys()
    for module, figures in of_run.items():
        for name in ("condition_number", "l1_norm", "total_frobenius"):
            assert of_model[module][name] == pytest.approx(figures[name], rel=1e-5)

    records = load_run(measured)
    assert labels(records.config)["editor"] == "edited (edited elsewhere)"
    assert any("differs from its base in 1 tensors" in note for note in notes_of(records))
    provenance = json.loads((measured / "provenance.json").read_text())
    assert provenance["editor"]["edited"]["differs_in"] == list(of_run)
    assert {path.name for path in measured.iterdir()} == {path.name for path in edited.iterdir()}
    before = (measured / "evals.jsonl").read_bytes()
    assert run(arguments) == 0
    assert (measured / "evals.jsonl").read_bytes() == before  # already done
