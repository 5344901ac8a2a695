"""`editkit push`, offline: a finished run is sent as a live tracker would have sent it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from editkit.records.writer import save_samples
from editkit.trackers.history import rows
from editkit.trackers.remote import cell_id
from editkit.wandb.client import Target, read_marker
from editkit.wandb.push import push
from tests.support.records import EVALS, STEPS, write_run
from tests.support.wandb_log import logged
from tests.support.wandb_runs import (
    CONFIG,
    SAMPLES,
    cell,
    numbers,
    plain,
    tracker,
    watch,
    without_media,
)

pytest.importorskip("wandb", reason="wandb is not installed: the extra 'wandb'")


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
    assert log.run.run_id == cell_id(run) == read_marker(run)["id"]
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
