"""`editkit tune`: its trials, its table and recipe, resuming, and wrong input."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from editkit.config.compose import compose
from editkit.errors import ConfigError
from editkit.tuning.prepare import prepare
from editkit.tuning.table import Number, Outcome, combined
from editkit.tuning.write import _place, changed, objective

TINY = ("model=tiny-llama", "editor=ft", "tracker=none", "runtime.threads=1")
SPACE = ("editor.layers=[0]", "editor.lr=0.001,0.004", "editor.norm_constraint=0.01")
SMALL = (*TINY, *SPACE, "editor.steps=5", "tune.edits=2")
FOLDER = Path("outputs/tune/tiny-llama-ft-none-world")
Call = Callable[..., tuple[int, str, str]]


# The command, interrupted when its second run begins.
INTERRUPTED = """
from editkit.cli import main
from editkit.runner import session

runs, original = [], session.run

def interrupted(experiment, **options):
    runs.append(experiment)
    if len(runs) == 2:
        raise KeyboardInterrupt
    return original(experiment, **options)

session.run = interrupted
main.main()
"""


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """Calls the command in an empty folder: its exit code, stdout, and stderr on one line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str, program: tuple[str, ...] = ("-m", "editkit")) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, *program, "tune", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, " ".join(done.stderr.split())

    return call


def finished() -> dict[Path, int]:
    """When each trial was finished."""
    return {path: path.stat().st_mtime_ns for path in FOLDER.glob("trials/*/*/DONE")}


def table() -> list[dict[str, Any]]:
    """The trials of the written table, without the times."""
    trials = json.loads((FOLDER / "table.json").read_text())["trials"]
    return [
        {key: value for key, value in row.items() if key != "seconds_an_edit"} for row in trials
    ]


def test_a_search_writes_its_table_and_a_recipe_that_runs(tune: Call) -> None:
    code, out, err = tune(*SMALL)
    assert code == 0, err
    assert "Score: the harmonic mean of efficacy, generalization, locality" in " ".join(out.split())
    rows = table()
    assert len(rows) == 3, "two points, and the numbers as they are configured"
    assert {row["state"] for row in rows} == {"done"}
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True)
    for row in rows:
        numbers = [metric["value"] for metric in row["metrics"]]
        assert [metric["n"] for metric in row["metrics"]] == [2, 2, 2]
        harmonic = len(numbers) / sum(1 / value for value in numbers) if all(numbers) else 0.0
        assert row["score"] == pytest.approx(harmonic)
    written = list(csv.DictReader((FOLDER / "table.csv").read_text().splitlines()))
    assert [int(row["trial"]) for row in written] == [row["trial"] for row in rows]
    text = (FOLDER / "table.md").read_text()
    assert "dataset.order=reversed" in text and text.count("\n| ") == 5

    recipe = FOLDER / "conf/recipe/ft/tiny-llama-tuned.yaml"
    values = yaml.safe_load(recipe.read_text())
    assert values["recipe"]["provenance"] == "tuned"
    assert "editkit tune model=tiny-llama editor=ft" in values["recipe"]["source"]
    assert f"score {100 * scores[0]:.1f}" in values["recipe"]["source"]
    composed = compose(
        ["model=tiny-llama", "editor=ft", "recipe=ft/tiny-llama-tuned"],
        config_dir=FOLDER / "conf",
    )
    best = {item.partition("=")[0]: item.partition("=")[2] for item in rows[0]["overrides"]}
    assert composed.config["editor"]["steps"] == 5, "a value that the user set is kept"
    assert composed.config["editor"]["layers"] == [0]
    assert composed.config["editor"]["lr"] == float(best.get("editor.lr", 0.002))
    assert (
        f"--config-dir {FOLDER}/conf model=tiny-llama editor=ft recipe=ft/tiny-llama-tuned" in out
    )


@pytest.mark.slow
def test_an_interrupted_search_resumes_to_the_same_table(tune: Call) -> None:
    code, out, _ = tune(*SMALL, program=("-c", INTERRUPTED))
    assert code == 130
    assert "repeat the command to resume" in out
    assert [row["state"] for row in table()].count("done") == 1
    assert not (FOLDER / "conf").exists(), "half a search recommends nothing"
    before = finished()
    assert len(before) == 1
    assert tune(*SMALL)[0] == 0
    after, resumed = finished(), table()
    assert len(after) == 3 and before.items() <= after.items(), "a finished trial is not run again"
    assert [row["score"] is not None for row in resumed] == [True] * 3
    assert tune(*SMALL)[0] == 0
    assert finished() == after and table() == resumed


@pytest.mark.slow
def test_a_killed_search_resumes_to_the_table_of_an_uninterrupted_one(
    tune: Call, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "editkit", "tune", *SMALL]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    until = time.monotonic() + 300
    while not list((tmp_path / FOLDER).glob("trials/*/*/DONE")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / FOLDER / "table.json").exists()
    assert tune(*SMALL)[0] == 0
    resumed = table()
    other = tmp_path / "other"
    other.mkdir()
    os.chdir(other)  # the fixture returns to the first folder
    assert tune(*SMALL)[0] == 0
    assert table() == resumed


@pytest.mark.slow
def test_views_of_one_sequence_are_edited_once(tune: Call) -> None:
    code, _, err = tune(
        *TINY, "restraint=prune", "tune.sequential=2", "restraint.prune.alpha=1.6,2.7"
    )
    assert code == 0, err
    folder = Path("outputs/tune/tiny-llama-ft-prune-world")
    assert len(list(folder.glob("trials/*/*/DONE"))) == 1
    trials = json.loads((folder / "table.json").read_text())["trials"]
    assert len(trials) == 2, "the configured alpha of 1.6 is one of the points"
    assert all(row["score"] is not None for row in trials)
    (recipe,) = folder.glob("conf/restraint_recipe/prune/*.yaml")
    assert yaml.safe_load(recipe.read_text())["restraint"]["prune"].keys() == {"alpha"}


def problems_of(*words: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        prepare(words, None)
    return caught.value.problems


def test_wrong_input_is_reported_together_before_a_model_is_loaded() -> None:
    problems = problems_of(
        *TINY, "editor.lrr=1,2", "editor.lr=interval(2,1)", "tune.trials=0", "edits=5", "suite=none"
    )
    keys = [problem.partition(":")[0] for problem in problems]
    assert keys[:2] == ["edits", "tune.trials"]
    assert "set tune.edits" in problems[0]
    problems = problems_of(*TINY, "editor.lrr=1,2", "editor.lr=interval(2,1)", "edits=5")
    keys = [problem.partition(":")[0] for problem in problems]
    assert keys == ["edits", "editor.lrr", "editor.lr"]
    assert "did you mean editor.lr?" in problems[1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("editor=mend", "model=tiny-gpt2"), "tune: editor=mend has no search space"),
        ((*TINY, "tune.edits=5000"), "tune.edits: dataset=world has 2080 requests (got 5000;"),
        ((*TINY, "batch_size=10"), "Fix: set tune.batch_size"),
        (
            (*TINY, "tune.batch_size=0"),
            "tune.batch_size: out of range (got 0; expected at least 1)",
        ),
        (
            ("model=tiny-llama", "editor=rome", "tune.sequential=4", "tune.batch_size=2"),
            "tune.batch_size: ",
        ),
        ((*TINY, "tune.trails=3"), "did you mean tune.trials?"),
        ((*TINY, "tune=nothing"), "tune/nothing"),
        (("model=tiny-llama", "editor=ft,rome"), "editor: one search has one choice"),
        ((*TINY, "restraint=none", "restraint.prune.alpha=1.5,2"), "restraint.prune: unknown"),
        ((*TINY, "editor.lr=0.1,quick"), "editor.lr: "),
        (("model=hf", "editor=ft"), "model.id: mandatory value is not set"),
    ],
)
def test_each_problem_names_its_key(words: tuple[str, ...], expected: str) -> None:
    assert any(expected in problem for problem in problems_of(*words)), problems_of(*words)


def test_the_trials_edit_facts_that_a_run_in_file_order_does_not_edit() -> None:
    tuning = prepare([*SMALL, "dataset=world"], None)
    first = compose(["model=tiny-llama", "dataset=world"]).config
    assert first["dataset"]["order"] == "file"
    from editkit.config.build import build

    reported = build(first).data.requests
    assert [each.id for each in tuning.data.requests[:2]] == [
        reported[-1].id,
        reported[-2].id,
    ]


def test_the_sequence_is_edited_in_batches_and_single_edits_one_by_one() -> None:
    tuning = prepare(
        ["model=tiny-llama", "editor=ultraedit", "tune.edits=4", "tune.trials=1"], None
    )
    sizes = {name: [word for word in arm if "batch" in word] for name, arm in tuning.arms.items()}
    assert sizes == {"single": ["batch_size=1"], "sequential": ["batch_size=10"]}
    found = Outcome(rows=(), protocol=None)
    assert "a sequence of 50 edits in batches of 10" in objective(tuning, found)


@pytest.mark.slow
def test_a_dataset_with_a_part_for_tuning_is_tuned_on_that_part() -> None:
    facts = [*TINY, "dataset=facts", "tune.trials=1", "dataset.order=shuffled"]
    tuning = prepare(facts, None)
    reported = {
        request.subject for request in prepare([*facts, "dataset.split=report"], None).data.requests
    }
    assert "dataset.split=tune" in tuning.order
    assert not reported & {request.subject for request in tuning.data.requests}


def test_a_model_without_a_recipe_is_tuned_from_the_space_alone() -> None:
    tuning = prepare(
        ["model=hf", "model.id=asset:tiny-gptj", "editor=memit", "tune.trials=3"], None
    )
    assert len(tuning.trials) == 3, "there are no configured numbers to try"
    for trial in tuning.trials:
        editor = trial.config["editor"]
        assert "???" not in json.dumps(editor)
        assert editor["layers"] == list(range(editor["layers"][0], editor["layers"][-1] + 1))


@pytest.mark.slow
def test_the_restraints_numbers_are_searched_if_one_is_chosen() -> None:
    with_eac = prepare(["model=tiny-llama", "editor=rome", "restraint=eac", "tune.trials=1"], None)
    assert {each.key for each in with_eac.dimensions} == {
        "restraint.eac.gamma",
        "restraint.eac.l2",
    }
    named = prepare(
        ["model=tiny-llama", "editor=rome", "restraint=eac", "tune=rome", "tune.trials=1"], None
    )
    assert "editor.layers" in {each.key for each in named.dimensions}


def test_the_standard_error_of_a_harmonic_mean_follows_the_delta_method() -> None:
    def number(value: float, stderr: float | None) -> Number:
        return Number(arm="single", metric="efficacy", value=value, stderr=stderr, n=10)

    mean, error = combined([number(0.5, 0.1), number(1.0, 0.0)])
    assert mean == pytest.approx(2 / 3)
    step = 1e-6
    slope = (2 / (1 / (0.5 + step) + 1) - mean) / step
    assert error == pytest.approx(slope * 0.1, rel=1e-4)
    assert combined([number(0.0, 0.1), number(1.0, 0.0)]) == (0.0, None)
    assert combined([number(0.5, None), number(1.0, 0.0)])[1] is None


def test_a_restraints_recipe_goes_where_its_file_looks_for_it() -> None:
    choices = {"editor": "rome", "model": "gpt2", "dataset": "facts"}
    assert _place("prune", choices) == "gpt2"
    assert _place("eac", choices) == "rome/gpt2/facts"
    assert _place("mine", choices) == "gpt2"


def test_a_recipe_holds_what_differs_from_the_plain_editor() -> None:
    plain = {"_target_": "a.B", "name": "x", "steps": 3, "target": {"lr": 1, "kl": 2}}
    tuned = {"_target_": "a.B", "name": "y", "steps": 3, "target": {"lr": 5, "kl": 2}}
    assert changed(tuned, plain) == {"target": {"lr": 5}}
