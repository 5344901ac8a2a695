"""The W&B tracker, offline: what is logged is read back from W&B's own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editkit.errors import ConfigError
from editkit.records.tracker import RunInfo
from editkit.trackers.guarded import Guarded
from editkit.trackers.history import History, rows, sample_table
from editkit.trackers.remote import cell_id
from tests.support.records import EVALS, MODULES, STEPS
from tests.support.wandb_log import logged
from tests.support.wandb_runs import (
    CONFIG,
    Listener,
    cell,
    numbers,
    plain,
    tracker,
    watch,
    without_media,
)

pytest.importorskip("wandb", reason="wandb is not installed: the extra 'wandb'")


def test_a_run_is_logged_with_its_names_and_every_number_of_its_files(tmp_path: Path) -> None:
    run = cell(tmp_path)
    watch(tracker(), run)
    (log,) = logged(run)
    assert (log.run.project, log.run.run_group, log.run.job_type, log.run.run_id) == (
        "editkit",
        "table",
        "edit",
        cell_id(run),
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
    assert log.run.run_id == cell_id(run)
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
