"""One contract for all trackers that send a run somewhere: what was logged is read back through
the tracker's own library and compared with the records."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from editkit.config.compose import compose, stacked_trackers
from editkit.errors import ConfigError
from editkit.trackers import mlflow, require, tensorboard, trackio
from editkit.trackers.history import rows
from editkit.trackers.remote import AbstractRemote, cell_name
from tests.support.records import EVALS, STEPS
from tests.support.wandb_log import logged
from tests.support.wandb_runs import Listener, cell, numbers, plain, watch, without_media
from tests.support.wandb_runs import tracker as wandb_tracker

History = dict[int, dict[str, float]]


def read_tensorboard(run: Path, folder: Path) -> History:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / tensorboard.FOLDER))
    events.Reload()
    history: History = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            history.setdefault(event.step, {})[name] = event.value
    return history


def read_mlflow(run: Path, folder: Path) -> History:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
    (sent,) = client.search_runs([client.get_experiment_by_name("table").experiment_id])
    assert sent.info.status == "FINISHED" and sent.data.params["editor"] == "rome"
    history: History = {}
    for name in sent.data.metrics:
        for metric in client.get_metric_history(sent.info.run_id, name):
            history.setdefault(metric.step, {})[name] = metric.value
    return history


def read_trackio(run: Path, folder: Path) -> History:
    from trackio.sqlite_storage import SQLiteStorage

    history: History = {}
    for row in SQLiteStorage.get_logs("editkit", cell_name(run)):
        values = {name: value for name, value in row.items() if "/" in name}
        if not {"run/failed"} & set(values):
            history.setdefault(row["step"], {}).update(values)
    return history


def read_wandb(run: Path, folder: Path) -> History:
    *_, log = logged(run)
    return without_media(numbers(log.history))


def mlflow_tracker(beside: Any, folder: Path) -> AbstractRemote:
    return mlflow.Mlflow(beside=beside, uri=(folder / "mlflow").as_uri(), experiment=None)


Make = Callable[[Any, Path], AbstractRemote]
TRACKERS: dict[str, tuple[Make, Callable[[Path, Path], History]]] = {
    "tensorboard": (lambda beside, _: tensorboard.Tensorboard(beside=beside), read_tensorboard),
    "mlflow": (mlflow_tracker, read_mlflow),
    "trackio": (
        lambda beside, _: trackio.Trackio(beside=beside, project="editkit", space=None),
        read_trackio,
    ),
    "wandb": (lambda beside, _: wandb_tracker(beside), read_wandb),
}


@pytest.fixture(params=list(TRACKERS))
def named(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a tracker whose package is installed; its stores lie in the test's folder."""
    name = str(request.param)
    pytest.importorskip(name, reason=f"{name} is not installed: the extra '{name}'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    if name == "trackio":
        from trackio import sqlite_storage, utils

        for module in (sqlite_storage, utils):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    return name


def close(history: History, expected: History) -> bool:
    """Whether both have the same names and values; TensorBoard keeps float32."""
    return {step: set(row) for step, row in history.items()} == {
        step: set(row) for step, row in expected.items()
    } and all(
        math.isclose(history[step][name], value, rel_tol=1e-6)
        for step, row in expected.items()
        for name, value in row.items()
    )


def finite(history: History) -> History:
    return {
        step: {name: value for name, value in row.items() if isinstance(value, int | float)}
        for step, row in plain(history).items()
    }


def test_what_was_logged_is_read_back_with_the_library_of_the_tracker(
    named: str, tmp_path: Path
) -> None:
    make, read = TRACKERS[named]
    run, beside = cell(tmp_path), Listener()
    watch(make(beside, tmp_path), run)
    assert close(finite(read(run, tmp_path)), plain(rows(STEPS, EVALS, trajectory="unrestrained")))
    assert beside.heard[0] == "open" and beside.heard[-1] == "closed: done"
    assert not [text for text in beside.heard if "failed" in text]


def test_a_resumed_run_continues_in_the_same_place(named: str, tmp_path: Path) -> None:
    make, read = TRACKERS[named]
    run = cell(tmp_path)
    watch(make(Listener(), tmp_path), run, status="interrupted")
    watch(make(beside := Listener(), tmp_path), run, resumed_at=1)
    assert not [text for text in beside.heard if "failed" in text]
    if named != "wandb":  # a second offline file holds the second session alone
        history = finite(read(run, tmp_path))
        assert close(history, plain(rows(STEPS, EVALS, trajectory="unrestrained")))


def test_a_tracker_that_fails_does_not_stop_the_run(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, _ = TRACKERS[named]
    beside = Listener()
    tracker = make(beside, tmp_path)
    monkeypatch.setattr(type(tracker), "connect", lambda self, run: 1 / 0)
    watch(tracker, cell(tmp_path))
    assert [text for text in beside.heard if f"{tracker.title} failed and is switched off" in text]
    assert beside.heard[-1] == "closed: done"


def test_trackers_stand_in_a_row_and_the_console_is_the_last() -> None:
    assert stacked_trackers(["seed=1", "tracker=[console,wandb,tensorboard]"]) == [
        "seed=1",
        "tracker=wandb",
        "tracker@tracker.beside=tensorboard",
        "tracker@tracker.beside.beside=console",
    ]
    node = compose(["tracker=[tensorboard,mlflow]", "model=tiny-gpt2"]).config["tracker"]
    targets = [node["_target_"], node["beside"]["_target_"], node["beside"]["beside"]["_target_"]]
    assert [target.rpartition(".")[2] for target in targets] == ["Tensorboard", "Mlflow", "Console"]


@pytest.mark.parametrize("names", ["", "wandb,wandb", "console,none"])
def test_trackers_that_cannot_be_combined_are_refused(names: str) -> None:
    with pytest.raises(ConfigError, match=r"tracker: these trackers cannot be combined"):
        stacked_trackers([f"tracker=[{names}]"])


@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio"])
def test_a_missing_package_is_reported_with_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(require.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed.*editkit\[{name}\]"):
        TRACKERS[name][0](Listener(), tmp_path)


def test_no_tracker_imports_its_library_before_a_run_is_opened() -> None:
    for name in ("tensorboard", "mlflow", "trackio"):
        module = importlib.import_module(f"editkit.trackers.{name}")
        assert name not in vars(module) and "SummaryWriter" not in vars(module)
