"""Measurements are looked up by what tells them apart, and a line of evals.jsonl keeps its form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from editkit.errors import ConfigError
from editkit.records.reader import load_run
from editkit.types import EVAL_FIELDS, EvalRecord, as_json
from tests.support.paths import TESTS
from tests.support.records import EVALS, changed, editing, write_run

EARLIER = TESTS / "data" / "runs_before_rooms" / "done"


def test_lines_of_an_earlier_version_are_read_and_written_byte_for_byte() -> None:
    lines = (EARLIER / "evals.jsonl").read_bytes().splitlines()
    records = load_run(EARLIER).evals
    assert len(lines) == len(records) > 50
    for line, record in zip(lines, records, strict=True):
        assert json.dumps(as_json(record)).encode() == line


def test_a_record_is_its_line() -> None:
    record = editing(2, "efficacy", 0.5)
    assert tuple(record.flat()) == EVAL_FIELDS
    assert EvalRecord.from_flat(record.flat()) == record


def test_protocols_of_one_metric_do_not_hide_each_other(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path))
    facts = {"step": 2, "view": "unrestrained", "metric": "efficacy"}
    assert run.value(**facts, protocol="probability") == 1.0
    assert run.value(**facts, protocol="argmax") == 0.5
    with pytest.raises(ConfigError, match=r"2 evaluations .* protocol \(probability, argmax\)"):
        run.value(**facts)


def test_a_block_and_a_subset_are_not_the_whole(tmp_path: Path) -> None:
    whole = editing(2, "efficacy", 0.5)
    parts = [changed(whole, block="1-2", value=0.1), changed(whole, subset="succeeded", value=0.2)]
    run = load_run(write_run(tmp_path, evals=[*parts, whole]))
    assert run.value(step=2, metric="efficacy") == 0.5
    assert run.value(step=2, metric="efficacy", block="1-2") == 0.1
    assert [record.measurement.value for record in run.find(metric="efficacy")] == [0.1, 0.2, 0.5]


def test_no_match_lists_the_values_that_exist(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, evals=EVALS))
    with pytest.raises(
        ConfigError, match=r"no evaluation with metric='eficacy' \(expected metric: .*efficacy"
    ):
        run.value(metric="eficacy")
    facts = {"step": 2, "view": "unrestrained", "metric": "efficacy"}
    with pytest.raises(ConfigError, match=r"\(expected protocol: probability, argmax\)\.$"):
        run.value(**facts, protocol="token")
    # A task's metric needs the task.
    with pytest.raises(ConfigError, match=r"\(expected task: entailment; metric: locality, "):
        run.value(step=2, view="unrestrained", metric="accuracy")
    # No single other fact would do: the values of all facts are listed.
    with pytest.raises(ConfigError, match=r"\(expected step: 0, 2; view: unrestrained, prune\)\.$"):
        run.value(step=7, view="rect")
    with pytest.raises(ConfigError, match="unknown field of an evaluation: metrik"):
        run.find(metrik="efficacy")


def test_equal_evaluations_are_left_to_find(tmp_path: Path) -> None:
    twice = [editing(2, "efficacy", 0.5), editing(2, "efficacy", 0.6)]
    run = load_run(write_run(tmp_path, evals=twice))
    with pytest.raises(ConfigError, match=r"2 evaluations .*\. Fix: read them with find\(\)"):
        run.value(metric="efficacy")
