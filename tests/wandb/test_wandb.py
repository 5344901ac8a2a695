"""Weights & Biases, offline: what is logged is read back from W&B's own files."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from editkit.config.build import build
from editkit.config.compose import compose, conf_folder
from editkit.errors import ConfigError
from editkit.records.find import load_runs
from editkit.records.reader import load_run
from editkit.records.tracker import AbstractTracker, RunInfo
from editkit.records.writer import save_samples
from editkit.trackers.guarded import Guarded
from editkit.trackers.none import Silent
from editkit.types import SampleRecord
from editkit.wandb.client import Target, read_marker, run_id
from editkit.wandb.dashboard import definition, workspace
from editkit.wandb.history import History, rows, sample_table
from editkit.wandb.push import push
from editkit.wandb.tracker import Wandb
from tests.support.records import EVALS, MODULES, STEPS, write_run
from tests.support.wandb_log import logged

pytest.importorskip("wandb", reason="wandb is not installed: the extra 'wandb'")

CONFIG: dict[str, Any] = {
    "name": "tiny-rome",
    "experiment_name": "table",
    "model": {"name": "tiny-gpt2", "id": "asset:tiny-gpt2"},
    "editor": {"name": "rome"},
    "restraint": {"eac": {}, "prune": {"apply_at": "evaluation"}},
    "dataset": {"name": "world"},
    "suite": {"name": "paper"},
}
SAMPLES = SampleRecord(
    step=2,
    view="prune",
    name="paper-gsm8k",
    rows=tuple({"prompt": "1 + 1?", "output": 2, "ids": [1, 2]} for _ in range(9)),
)


class Listener(Silent):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def open(self, run: RunInfo) -> None:
        self.heard.append("open")

    def step(self, record) -> None:
        self.heard.append("step")

    def samples(self, record) -> None:
        self.heard.append("samples")

    def warning(self, text: str) -> None:
        self.heard.append(text)

    def close(self, status) -> None:
        self.heard.append(f"closed: {status}")


def tracker(beside: AbstractTracker | None = None, **options: Any) -> Wandb:
    given = {
        "mode": "offline",
        "project": "editkit",
        "entity": None,
        "job_type": "edit",
        "tags": ("mine",),
        "max_samples": 5,
    }
    return Wandb(
        beside=beside or Listener(),
        **(given | {"figures": True, "artifacts": False, "timeout_s": 30.0} | options),
    )


def cell(folder: Path, **records: Any) -> Path:
    run = write_run(folder / "table" / "tiny-rome-0123" / "seed1", **records)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (run / "figures").mkdir(exist_ok=True)
    pixel = "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    pixel += "0000000c49444154789c63f8ffff3f0005fe02fe0def46b80000000049454e44ae426082"
    (run / "figures" / "spectrum.png").write_bytes(bytes.fromhex(pixel))
    (run / "state").mkdir(exist_ok=True)
    (run / "state" / "step-00000002.safetensors").write_bytes(b"delta")
    (run / "state" / "latest.json").write_text(
        json.dumps({"file": "step-00000002.safetensors", "step": 2})
    )
    return run


def watch(watching: AbstractTracker, run: Path, *, resumed_at: int = 0, status="done") -> None:
    views = ("unrestrained", "prune")
    watching.open(
        RunInfo(
            name="tiny-rome",
            folder=run,
            edits=4,
            batch_size=2,
            views=views,
            config=CONFIG,
            resumed_at=resumed_at,
        )
    )
    for step in STEPS[resumed_at and resumed_at + 1 :]:
        watching.step(step)
        for record in EVALS:
            if record.step == step.step:
                watching.evaluation(record)
        if SAMPLES.step == step.step:
            watching.samples(SAMPLES)
    watching.close(status)


def numbers(history: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """The plain numbers of a logged history by step, without W&B's own."""
    return {
        row["_step"]: {
            name: value
            for name, value in row.items()
            if isinstance(value, int | float) and not name.startswith("_") and "/_" not in name
        }
        for row in history
    }


def plain(history: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {
        step: {name: value for name, value in row.items() if not math.isnan(value)}
        for step, row in history.items()
    }


def without_media(history: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    media = ("figures/", "samples/", "evaluations")
    return {
        step: {name: value for name, value in row.items() if not name.startswith(media)}
        for step, row in history.items()
    }


@pytest.fixture(scope="module", autouse=True)
def _service():
    """W&B's own process ends with the module; nothing of the environment's sweeps or keys is
    read.
    """
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("WANDB_")}
    os.environ["WANDB_ERROR_REPORTING"] = "false"
    yield
    import wandb

    wandb.teardown()
    del os.environ["WANDB_ERROR_REPORTING"]
    os.environ.update(kept)


def test_a_run_is_logged_with_its_names_and_every_number_of_its_files(tmp_path: Path) -> None:
    run = cell(tmp_path)
    watch(tracker(), run)
    (log,) = logged(run)
    assert (log.run.project, log.run.run_group, log.run.job_type, log.run.run_id) == (
        "editkit",
        "table",
        "edit",
        run_id(run),
    )
    assert log.run.display_name == "tiny-rome/seed1"
    assert list(log.run.tags) == ["tiny-gpt2", "rome", "eac", "prune", "world", "paper", "mine"]
    assert log.config["model"] == CONFIG["model"]
    assert log.config["label_restraint"] == "eac+prune"
    assert [
        (metric.glob_name, metric.step_metric) for metric in log.metrics if metric.glob_name
    ] == [("*", "edit/step")]
    assert without_media(numbers(log.history)) == plain(
        rows(STEPS, EVALS, trajectory="unrestrained")
    )
    assert log.exit_code == 0


def test_rows_hold_condition_number_l1_and_loss_per_module_and_over_all_of_them() -> None:
    row = rows(STEPS, EVALS, trajectory="unrestrained")[2]
    assert row["modules/h/1/mlp/c_proj/condition_number"] == 900.0
    assert row["weights/condition_number/unrestrained"] == 900.0
    assert row["weights/l1_norm/unrestrained"] == 1000.0
    assert row["edit/loss"] == 0.04
    assert (row["edit/step"], row["edit/edits"]) == (2, 4)
    assert row["editing/argmax/efficacy/prune"] == 0.5
    assert row["downstream/world/entailment/accuracy/prune"] == 0.9
    assert len(MODULES) == 2


def test_evaluations_and_generations_are_tables_and_figures_are_images(tmp_path: Path) -> None:
    run = cell(tmp_path)
    watch(tracker(), run)
    (log,) = logged(run)
    media = log.path.parent / "files" / "media"
    (evaluations,) = media.glob("table/evaluations*.json")
    table = json.loads(evaluations.read_text())
    assert len(table["data"]) == len(EVALS)
    assert {"step", "view", "metric", "value", "protocol"} <= set(table["columns"])
    (samples,) = media.glob("table/samples/paper-gsm8k/*.json")
    assert json.loads(samples.read_text()) == {
        "columns": ["prompt", "output", "ids"],
        "data": [["1 + 1?", 2, "[1, 2]"]] * 5,
    }
    assert len(list(media.glob("images/figures/spectrum*.png"))) == 1


def test_a_column_of_samples_that_mixes_types_becomes_text() -> None:
    assert sample_table([{"a": 1}, {"a": "x"}, {"b": None}], 9) == (
        ["a", "b"],
        [["1", None], ["x", None], [None, None]],
    )


@pytest.mark.parametrize("wanted", [False, True], ids=["by default", "if asked for"])
def test_artifacts_hold_configuration_and_delta_only_if_asked_for(
    tmp_path: Path, wanted: bool
) -> None:
    run = cell(tmp_path)
    watch(tracker(artifacts=wanted), run)
    (log,) = logged(run)
    found = {
        each.type: [entry.path for entry in each.manifest.contents]
        for each in log.artifacts
        if each.type in ("config", "delta")
    }
    assert found == (
        {"config": ["config.yaml"], "delta": ["latest.json", "step-00000002.safetensors"]}
        if wanted
        else {}
    )


def test_cells_that_share_a_process_get_a_wandb_run_each_also_at_the_same_time(
    tmp_path: Path,
) -> None:
    first, second = cell(tmp_path / "a" / "x"), cell(tmp_path / "b")
    (tmp_path / "b" / "table").rename(tmp_path / "b" / "other")
    second = tmp_path / "b" / "other" / second.parent.name / second.name
    one, two = tracker(), tracker()
    info = {"name": "n", "edits": 4, "batch_size": 2, "views": ("unrestrained",), "config": CONFIG}
    one.open(RunInfo(folder=first, **info))
    two.open(RunInfo(folder=second, **info))
    one.step(STEPS[0])
    two.step(STEPS[0])
    two.step(STEPS[1])
    one.close("done")
    two.close("failed")
    (log_one,), (log_two,) = logged(first), logged(second)
    assert log_one.run.run_id != log_two.run.run_id
    assert [row["_step"] for row in log_one.history] == [0, 2]  # the last one holds the table
    assert [row["_step"] for row in log_two.history] == [0, 1, 2]
    assert (log_one.exit_code, log_two.exit_code) == (0, 1)


def test_a_run_that_goes_on_keeps_its_id_and_counts_its_edits_on(tmp_path: Path) -> None:
    run = cell(tmp_path)
    watch(tracker(), run, resumed_at=1)
    (log,) = logged(run)
    assert log.run.run_id == run_id(run)
    assert numbers(log.history)[2]["edit/edits"] == 4
    assert History(trajectory="unrestrained", edits=2).step(STEPS[1])["edit/edits"] == 4


def test_the_display_beside_it_hears_everything(tmp_path: Path) -> None:
    beside = Listener()
    watch(tracker(beside, mode="disabled"), cell(tmp_path))
    assert beside.heard == ["open", "step", "step", "step", "samples", "closed: done"]
    assert not (tmp_path / "wandb").exists()


def test_a_wandb_that_fails_is_told_once_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("no network\nat all")

    monkeypatch.setattr(wandb, "init", refuse)
    beside = Listener()
    watch(tracker(beside, mode="online"), cell(tmp_path))
    warned = [text for text in beside.heard if "W&B" in text]
    assert warned == [
        "W&B failed and is switched off; the run and its files are not affected (CommError: no network at all)"
    ]
    assert [text for text in beside.heard if text not in warned] == [
        "open",
        "step",
        "step",
        "step",
        "samples",
        "closed: done",
    ]


def test_any_tracker_that_fails_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Listener):
        def step(self, record) -> None:
            raise RuntimeError("a full disk")

    failing = Failing()
    guarded = Guarded(failing)
    guarded.step(STEPS[0])
    guarded.step(STEPS[1])
    guarded.close("done")
    guarded.warning("still heard")
    assert failing.heard == []
    assert [record.getMessage() for record in caplog.records] == [
        "the tracker Failing failed and is switched off; the run and its files are not affected (RuntimeError: a full disk)",
        "still heard",
    ]


def test_wrong_options_are_told_with_their_key() -> None:
    with pytest.raises(ConfigError) as error:
        tracker(project="", max_samples=-1, timeout_s=0)
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "tracker.project",
        "tracker.max_samples",
        "tracker.timeout_s",
    ]


# --- push


def pushed(run: Path, **options: Any) -> str:
    return push(
        run, Target(mode="offline", project="editkit", entity=None, timeout_s=30.0, **options)
    )


def test_push_sends_what_a_live_tracker_would_have_sent(tmp_path: Path) -> None:
    live, later = cell(tmp_path / "live"), cell(tmp_path / "later")
    watch(tracker(tags=()), live)
    save_samples(SAMPLES, later / "samples")
    assert pushed(later, max_samples=5) == "sent"
    (one,), (two,) = logged(live), logged(later)
    assert numbers(two.history) == numbers(one.history)
    assert two.run.run_id == one.run.run_id
    assert list(two.run.tags) == list(one.run.tags)
    tables = [
        sorted(path.name for path in log.path.parent.glob("files/media/table/**/*.json"))
        for log in (one, two)
    ]
    assert tables[0] == tables[1]


def test_push_sends_nothing_twice_and_the_whole_run_anew_under_the_same_id_once_its_files_changed(
    tmp_path: Path,
) -> None:
    run = cell(
        tmp_path, steps=STEPS[:2], evals=[record for record in EVALS if record.step == 0]
    )  # interrupted
    assert [pushed(run), pushed(run)] == ["sent", "there already"]
    assert len(logged(run)) == 1
    write_run(run)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (run / "wandb").rename(tmp_path / "before")
    assert pushed(run) == "sent"
    (log,) = logged(run)
    assert log.run.run_id == run_id(run) == read_marker(run)["id"]
    assert without_media(numbers(log.history)) == plain(
        rows(STEPS, EVALS, trajectory="unrestrained")
    )


def test_push_keeps_the_id_that_a_sweeps_agent_chose(tmp_path: Path) -> None:
    run = cell(tmp_path)
    (run / "wandb.json").write_text(json.dumps({"id": "abc123", "pushed": None}))
    pushed(run)
    assert logged(run)[0].run.run_id == "abc123"


def test_push_leaves_a_run_alone_that_is_being_written(tmp_path: Path) -> None:
    from editkit.runner.lock import locked

    run = cell(tmp_path)
    with locked(run):
        assert pushed(run) == "still running"
    assert not (run / "wandb").exists()


# --- dashboard and sweep


def test_the_dashboard_has_the_papers_panels_against_edits_grouped_by_restraint(
    tmp_path: Path,
) -> None:
    pytest.importorskip("wandb_workspaces")
    runs = load_runs([cell(tmp_path)])
    made = definition(workspace(runs, project="editkit", entity="me", name="papers"))["spec"][
        "section"
    ]
    panels = {
        panel["config"]["chartTitle"]: panel["config"]
        for section in made["panelBankConfig"]["sections"]
        for panel in section["panels"]
    }
    assert {panel["xAxis"] for panel in panels.values()} == {"edit/edits"}
    assert [each["name"] for each in made["runSets"][0]["grouping"]] == [
        "label_model.value",
        "label_editor.value",
        "label_restraint.value",
    ]
    import re

    keys = {
        name
        for row in rows(runs[0].steps, runs[0].evals, trajectory="unrestrained").values()
        for name in row
    }
    for title in (
        "condition number (PRUNE, Figure 2)",
        "L1 norm (D4S and EAC: it grows with the edits)",
        "efficacy",
        "entailment: accuracy",
    ):
        assert any(re.search(panels[title]["metricRegex"], key) for key in keys), title
    sections = [section["name"] for section in made["panelBankConfig"]["sections"]]
    assert "Editing, protocol probability" in sections and "Editing, protocol argmax" in sections


def test_the_sweep_file_is_what_wandb_agent_takes_and_every_cell_builds(tmp_path: Path) -> None:
    from itertools import cycle, islice

    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((conf_folder() / "wandb_sweep.yaml").read_text())
    choices = {
        name: given.get("values", [given.get("value")])
        for name, given in sweep["parameters"].items()
    }
    for values in islice(
        zip(*map(cycle, choices.values()), strict=True), max(map(len, choices.values()))
    ):  # each value once at least
        args = {name: {"value": value} for name, value in zip(choices, values, strict=True)}
        replaced = create_sweep_command_args({"args": args})
        command = [
            part
            for word in create_sweep_command(sweep["command"])
            for part in (replaced.get(word.strip("${}"), [word]) if "$" in word else [word])
        ]
        assert command[:3] == ["editkit", "run", "tracker=wandb"]
        composed = compose([*command[2:], f"paths.outputs={tmp_path}"])
        experiment = build(composed.config, choices=composed.choices)
        assert experiment.seed == args["seed"]["value"]


def test_inside_a_sweep_the_agents_id_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    run = cell(tmp_path)
    watch(tracker(), run)
    assert logged(run)[0].run.run_id == "chosen" == read_marker(run)["id"]
    assert load_run(run).status == "unfinished"
