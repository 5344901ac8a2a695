"""The tidy table of all runs below some folders."""

from __future__ import annotations

from pathlib import Path

import pandas
import pytest

from editkit.errors import ConfigError
from editkit.records.find import load_runs
from editkit.report.collect import COLUMNS, collect, save
from tests.support.sweeps import a_sweep


def test_the_tidy_table_has_every_measurement_with_its_labels_and_survives_both_formats(
    tmp_path: Path,
) -> None:
    runs = load_runs([a_sweep(tmp_path / "runs")])
    found = collect(runs)
    assert list(found.columns) == list(COLUMNS)
    line = found[
        (found.restraint == "prune")
        & (found.seed == 2)
        & (found.metric == "efficacy")
        & (found.protocol == "probability")
        & (found.edits == 4)
    ]
    assert line.value.tolist() == [pytest.approx(0.78)]
    assert set(found.kind) == {"editing", "downstream", "weights", "edit"}
    for name in ("results.parquet", "results.csv"):
        save(found, tmp_path / name)
    again = pandas.read_parquet(tmp_path / "results.parquet")
    assert again.equals(found)
    assert len(pandas.read_csv(tmp_path / "results.csv")) == len(found)


def test_weights_are_collected_at_measured_steps_or_at_every_one(tmp_path: Path) -> None:
    runs = load_runs([a_sweep(tmp_path, seeds=1)])
    assert set(collect(runs).query("kind == 'weights'").edits) == {0, 4}
    assert set(collect(runs, every_step=True).query("kind == 'weights'").edits) == {0, 2, 4}


def test_another_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.parquet or \.csv"):
        save(collect([]), tmp_path / "results.xlsx")


def test_folders_without_runs_are_all_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as error:
        load_runs([tmp_path / "empty", tmp_path / "nowhere"])
    assert len(error.value.problems) == 2


def test_a_run_below_two_of_the_folders_is_read_once(tmp_path: Path) -> None:
    root = a_sweep(tmp_path, seeds=1)
    assert len(load_runs([root, root / "sweep", *root.glob("sweep/*/seed0")])) == 2
