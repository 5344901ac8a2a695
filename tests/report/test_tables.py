"""The summary of a run: what stands in a column, and what may not."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from editkit.errors import ConfigError
from editkit.records.reader import load_run
from editkit.report.show import Summary, run_table, show
from editkit.report.tables import (
    default_protocol,
    editing_protocols,
    edits_by_step,
    frame,
    markdown,
    number,
    summarise,
)
from editkit.types import EvalRecord
from tests.support.records import (
    EVALS,
    MODULES,
    STEPS,
    changed,
    editing,
    evaluation,
    task,
    write_run,
)


def table_of(evals: list[EvalRecord], *, protocol: str | None = "probability"):
    return summarise(STEPS, evals, edits=edits_by_step(STEPS), protocol=protocol)


def test_a_table_has_a_row_per_view_and_milestone_counted_in_edits():
    found = frame(table_of(EVALS))
    assert list(found.index) == [
        ("unrestrained", 0),
        ("unrestrained", 4),
        ("prune", 0),
        ("prune", 4),
    ]
    assert list(found.columns) == [
        "efficacy",
        "locality",
        "entailment",
        "condition number",
        "L1 norm",
    ]
    assert found.loc[("prune", 4), "efficacy"] == 1.0


def test_the_weights_columns_are_the_worst_condition_number_and_the_sum_of_l1_norms_of_the_trajectory():
    found = frame(table_of(EVALS))
    assert found.loc[("unrestrained", 4), "condition number"] == 900.0
    assert found.loc[("unrestrained", 4), "L1 norm"] == 1000.0
    assert math.isnan(
        found.loc[("prune", 4), "condition number"]
    )  # those weights were not looked at


def test_a_restrained_views_weights_are_shown_where_they_were_measured():
    measured = [
        evaluation(
            step=2,
            view="prune",
            kind="weights",
            metric="condition_number",
            task=module,
            value=value,
            stderr=None,
            n=1,
        )
        for module, value in zip(MODULES, (70.0, 60.0), strict=True)
    ]
    assert frame(table_of(EVALS + measured)).loc[("prune", 4), "condition number"] == 70.0


def test_fluency_and_consistency_stand_beside_every_protocol_in_their_own_units():
    texts = [
        editing(2, metric, value, view=view, protocol="text")
        for view in ("unrestrained", "prune")
        for metric, value in (("fluency_bits", 6.213), ("consistency", 0.314))
    ]
    for protocol in ("probability", "argmax"):
        table = table_of([*EVALS, *texts], protocol=protocol)
        titles = [column.title for column in table.columns]
        assert titles.index("entailment") == titles.index("consistency") + 1
        assert titles.index("consistency") == titles.index("fluency (bits)") + 1
        assert frame(table).loc[("prune", 4), "fluency (bits)"] == 6.213
        assert "| 6.2 | 31.4 |" in markdown(table)
    assert editing_protocols([*texts, *EVALS]) == ("probability", "argmax")
    assert editing_protocols(texts) == ("text",)
    alone = table_of(texts, protocol=default_protocol(texts))
    assert frame(alone).loc[("unrestrained", 4), "consistency"] == 0.314


def test_a_run_that_measures_nothing_but_weights_has_a_table_of_its_milestones(tmp_path: Path):
    steps = [
        replace(
            step,
            modules={
                module: figures | {"total_sigma_max": 0.5 * step.step}
                for module, figures in step.modules.items()
            },
        )
        for step in STEPS
    ]
    weights = evaluation(
        step=2,
        view="prune",
        kind="weights",
        task=MODULES[0],
        metric="l1_norm",
        value=7.0,
        stderr=None,
        n=1,
    )
    write_run(tmp_path, steps, [weights])
    config = "milestones: [0, 3]\nrestraint:\n  prune:\n    apply_at: evaluation\n"
    (tmp_path / "config.yaml").write_text(config)
    table = run_table(load_run(tmp_path))
    assert table.is_of_weights
    found = frame(table)
    assert list(found.index) == [("unrestrained", 0), ("unrestrained", 4), ("prune", 4)]
    assert list(found.loc[("unrestrained", 4)]) == [900.0, 1000.0, 1.0]
    assert found.loc[("prune", 4), "L1 norm"] == 7.0
    shown = io.StringIO()
    Console(width=120, file=shown).print(show(tmp_path))
    assert "largest singular value of the total" in " ".join(shown.getvalue().split())
    assert "largest condition number and singular value" in " ".join(shown.getvalue().split())
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    shown = io.StringIO()
    Console(width=120, file=shown).print(show(tmp_path))
    assert "no milestone was measured yet" in shown.getvalue()


def test_the_first_metric_of_a_task_stands_for_it():
    further = [
        changed(record, metric="accuracy_likelihood", value=0.1)
        for record in EVALS
        if record.measurement.task == "entailment"
    ]
    assert list(frame(table_of(EVALS + further)).columns) == [
        "efficacy",
        "locality",
        "entailment",
        "condition number",
        "L1 norm",
    ]
    assert frame(table_of(EVALS + further)).equals(frame(table_of(EVALS)))


def test_a_column_never_mixes_protocols():
    with pytest.raises(ConfigError, match=r"protocol.*efficacy.*probability, argmax"):
        table_of(EVALS, protocol=None)
    assert frame(table_of(EVALS, protocol="argmax")).loc[("prune", 4), "efficacy"] == 0.5


def test_a_column_never_mixes_versions_of_a_task():
    with pytest.raises(ConfigError, match=r"task_version.*entailment.*1, 2"):
        table_of([task(0, "entailment", 0.9), task(2, "entailment", 0.9, version=2)])


def test_a_column_never_mixes_numbers_of_examples_and_takes_records_that_do_not_tell():
    first, second = task(0, "entailment", 0.9), task(2, "entailment", 0.8)
    with pytest.raises(ConfigError, match=r"shots.*entailment.*0, 5"):
        table_of([changed(first, shots=0), changed(second, shots=5)])
    assert not frame(table_of([first, changed(second, shots=5)])).empty


def test_two_numbers_for_one_place_are_refused():
    with pytest.raises(ConfigError, match="measured twice for view 'unrestrained' at step 2"):
        table_of([editing(2, "efficacy", 1.0), editing(2, "efficacy", 0.9)])


def test_other_timings_stay_out_of_a_milestones_row():
    immediate = changed(editing(2, "efficacy", 0.1), timing="immediate")
    assert frame(table_of([*EVALS, immediate])).loc[("unrestrained", 4), "efficacy"] == 1.0


def test_probability_is_the_default_protocol_where_it_was_measured():
    assert default_protocol(EVALS) == "probability"
    assert (
        default_protocol(
            [record for record in EVALS if record.measurement.protocol != "probability"]
        )
        == "argmax"
    )


def test_markdown_shows_percents_and_names_the_protocol():
    lines = markdown(table_of(EVALS), stderr=True).splitlines()
    assert (
        lines[0]
        == "| view | edits | efficacy | locality | entailment | condition number | L1 norm |"
    )
    assert (
        lines[3] == "| unrestrained | 4 | 100.0 ± 2.0 | 75.0 ± 2.0 | 90.0 ± 10.0 | 900.0 | 1,000 |"
    )
    assert lines[5].endswith("| - | - |")
    assert "protocol 'probability'" in lines[-1]


def test_a_number_that_was_not_finite_is_shown_as_such():
    assert "| n/f |" in markdown(
        table_of([editing(2, "efficacy", None), editing(2, "locality", 0.5)])
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (41.23, "41.2"),
        (5120.3, "5,120"),
        (3.1e7, "3.1e+07"),
        (0.1, "0.1"),
        (0.0, "0"),
        (1e-4, "1.0e-04"),
        (math.nan, "n/f"),
    ],
)
def test_numbers_read_as_a_person_reads_them(value: float, text: str):
    assert number(value) == text


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_terminals_table_cuts_no_number(width: int):
    evals = EVALS + [
        task(step, name, 0.123, view=view)
        for step in (0, 2)
        for view in ("unrestrained", "prune")
        for name in ("arithmetic", "summary")
    ]
    console = Console(width=width, file=io.StringIO())
    console.print(Summary(title="a run", table=table_of(evals)))
    text = console.file.getvalue()
    assert text.count("12.3") == 8
    assert text.count("900.0") == 1
    assert all(len(line) <= width for line in text.splitlines())
    assert "…" not in text


def test_show_prints_a_runs_table_from_its_files(tmp_path: Path):
    shown = show(write_run(tmp_path / "run"), protocol="argmax")
    assert shown.title.endswith("run (unfinished)")
    assert frame(shown.table).equals(frame(table_of(EVALS, protocol="argmax")))
    with pytest.raises(ConfigError, match=r"protocol 'token'\. Measured: probability, argmax"):
        show(tmp_path / "run", protocol="token")


def test_a_runs_files_come_back_as_the_records_that_were_written(tmp_path: Path):
    run = load_run(write_run(tmp_path))
    assert (list(run.steps), list(run.evals)) == (STEPS, EVALS)
    assert run.config["model"]["id"] == "asset:tiny-gpt2"
    assert run.status == "unfinished"
    (tmp_path / "FAILED.json").write_text('{"error": "no space"}')
    assert load_run(tmp_path).status == "failed"
    (tmp_path / "DONE").touch()
    assert load_run(tmp_path).status == "done"


def test_a_run_that_is_still_writing_can_be_read(tmp_path: Path):
    with open(write_run(tmp_path) / "steps.jsonl", "a") as file:
        file.write('{"step": 3, "requ')
    assert len(load_run(tmp_path).steps) == len(STEPS)


def test_values_that_were_not_finite_can_be_read(tmp_path: Path):
    write_run(tmp_path, evals=[editing(2, "efficacy", None)])
    (tmp_path / "steps.jsonl").write_text(
        '{"step": 0, "modules": {"m": {"condition_number": null}}}\n'
    )
    run = load_run(tmp_path)
    assert math.isnan(run.steps[0].modules["m"]["condition_number"])
    assert run.evals[0].measurement.value is None
    assert markdown(run_table(run)).count("n/f |") == 1


def test_malformed_files_are_named_all_at_once(tmp_path: Path):
    write_run(tmp_path)
    (tmp_path / "steps.jsonl").write_text(
        '{"step": 0}\n{"step": \n{"step": 2, "target": {"loss": "low"}}\n'
    )
    (tmp_path / "evals.jsonl").write_text(
        '{"step": 1, "view": "prune", "kind": "editing", "n": 3}\n'
    )
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError) as caught:
        load_run(tmp_path)
    text = str(caught.value)
    assert [
        place
        for place in (
            "steps.jsonl:2",
            "steps.jsonl:3",
            "target.loss is 'low'",
            "evals.jsonl:1",
            "without metric",
            "config.yaml",
        )
        if place not in text
    ] == []


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="not a folder"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"it has no steps\.jsonl \(got 'notes\.txt'"):
        load_run(tmp_path)
