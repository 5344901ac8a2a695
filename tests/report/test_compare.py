"""Comparing runs: what counts as a repetition, the summary table, its LaTeX form, and the curves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas
import pytest

from editkit.errors import ConfigError
from editkit.records.find import load_runs
from editkit.report import formats
from editkit.report.compare.subjects import measured, pairs
from editkit.report.compare.summary import summaries
from editkit.report.figures.panels import MAX_POINTS, sheets
from tests.support.comparisons import rows_of, subjects_in, table
from tests.support.records import changed, editing, evaluation, task
from tests.support.sweeps import PRUNE, a_sweep, add_run, config_of, evals_of


def test_views_of_one_run_are_subjects_of_their_own_and_seeds_are_repetitions(
    tmp_path: Path,
) -> None:
    subjects = subjects_in(a_sweep(tmp_path))
    assert {(each.editor, each.restraint, each.seed) for each in subjects} == {
        ("rome", name, seed) for name in ("none", "prune", "rect") for seed in range(3)
    }
    assert len({each.subject for each in subjects}) == 3


def test_every_restrained_subject_finds_its_unrestrained_twin_also_in_another_run(
    tmp_path: Path,
) -> None:
    subjects = subjects_in(a_sweep(tmp_path))
    named = {each.subject: each.restraint for each in subjects}
    assert {named[one]: named[other] for one, other in pairs(subjects).items()} == {
        "prune": "none",
        "rect": "none",
    }


def test_d4s_and_memit_are_twins_though_their_editors_are_named_differently(tmp_path: Path) -> None:
    add_run(
        tmp_path,
        config_of(0, restraint={}, editor="memit"),
        evals_of(efficacy={"unrestrained": 0.1}),
    )
    add_run(
        tmp_path,
        config_of(0, restraint={"d4s": {}}, editor="d4s"),
        evals_of(efficacy={"unrestrained": 0.9}),
    )
    assert len(pairs(subjects_in(tmp_path))) == 1


def test_a_cell_that_is_there_twice_counts_once_and_is_told(tmp_path: Path) -> None:
    add_run(tmp_path, config_of(0, restraint={}), evals_of(efficacy={"unrestrained": 0.5}))
    add_run(
        tmp_path,
        config_of(0, restraint={"prune": PRUNE}),
        evals_of(efficacy={"unrestrained": 0.5, "prune": 0.6}),
    )
    subjects, notes = measured(load_runs([tmp_path]))
    assert sorted(each.restraint for each in subjects) == ["none", "prune"]
    assert len(notes) == 1 and "the same cell" in notes[0]


def test_subjects_that_differ_in_an_option_are_not_averaged_and_say_in_which(
    tmp_path: Path,
) -> None:
    for keep in (0.2, 0.4):
        add_run(
            tmp_path,
            config_of(0, restraint={"rect": {"keep": keep}}),
            evals_of(efficacy={"unrestrained": keep}),
        )
    assert {restraint for _, restraint in rows_of(table(tmp_path))} == {
        "rect (rect.keep=0.2)",
        "rect (rect.keep=0.4)",
    }


def test_a_restraint_in_the_loop_says_so(tmp_path: Path) -> None:
    config = config_of(0, restraint={"prune": {**PRUNE, "apply_at": "every", "every": 5}})
    add_run(tmp_path, config, evals_of(efficacy={"prune": 0.5}))
    (only,) = subjects_in(tmp_path)
    assert only.restraint == "prune every 5" and only.is_trajectory


def test_the_summary_holds_mean_and_standard_deviation_over_seeds(tmp_path: Path) -> None:
    found = rows_of(table(a_sweep(tmp_path)))
    assert found["rome", "none"]["efficacy"] == "51.0 ± 1.0"
    values = [70.0, 72.0, 78.0]
    assert (
        found["rome", "prune"]["efficacy"]
        == f"{sum(values) / 3:.1f} ± {pandas.Series(values).std():.1f}"
    )


def test_protocols_never_share_a_table(tmp_path: Path) -> None:
    tables = summaries(subjects_in(a_sweep(tmp_path)))
    assert [each.protocol for each in tables if each.edits == 4] == ["probability", "argmax", None]
    assert all(
        column.title != "entailment"
        for each in tables
        if each.is_editing
        for column in each.columns
    )
    abilities = [each for each in tables if each.edits == 4][-1]
    assert [column.title for column in abilities.columns] == [
        "entailment",
        "condition number",
        "L1 norm",
        "seconds an edit",
    ]


def test_a_column_of_two_versions_of_a_task_is_refused(tmp_path: Path) -> None:
    add_run(
        tmp_path, config_of(0, restraint={}), [task(0, "rte", 0.5), task(2, "rte", 0.5, version=2)]
    )
    with pytest.raises(ConfigError, match="task_version"):
        summaries(subjects_in(tmp_path))


def test_the_best_of_each_model_is_marked_ties_included_and_weights_are_no_contest(
    tmp_path: Path,
) -> None:
    add_run(
        tmp_path, config_of(0, restraint={}, model="a"), evals_of(efficacy={"unrestrained": 0.2})
    )
    add_run(
        tmp_path,
        config_of(0, restraint={"rect": {}}, model="a"),
        evals_of(efficacy={"unrestrained": 0.3}),
    )
    add_run(
        tmp_path, config_of(0, restraint={}, model="b"), evals_of(efficacy={"unrestrained": 0.9})
    )
    editing_table, abilities = table(tmp_path), table(tmp_path, protocol=None)
    best = {
        (row.model, row.restraint): row.cells[0].is_best
        for row in editing_table.rows
        if row.cells[0]
    }
    assert best == {
        ("a", "none"): False,
        ("a", "rect"): True,
        ("b", "none"): False,
    }  # b has no rival
    marked = {
        (row.model, column.title)
        for row in abilities.rows
        for cell, column in zip(row.cells, abilities.columns, strict=True)
        if cell and cell.is_best
    }
    assert marked == {("a", "entailment")}


def test_a_number_that_is_not_finite_is_never_left_out_of_a_mean(tmp_path: Path) -> None:
    for seed, value in enumerate((0.5, None, 0.7)):
        add_run(tmp_path, config_of(seed, restraint={}), evals_of(efficacy={"unrestrained": value}))
    assert rows_of(table(tmp_path))["rome", "none"]["efficacy"] == "n/f (1 of 3)"


def test_a_run_that_collapsed_on_the_way_is_counted_in_the_row(tmp_path: Path) -> None:
    add_run(tmp_path, config_of(0, restraint={}), evals_of(efficacy={"unrestrained": 0.5}))
    collapse = {"kind": "collapse", "error": "loss is not finite", "step": 1}
    add_run(
        tmp_path,
        config_of(1, restraint={}),
        evals_of(efficacy={"unrestrained": None}, steps=(0,)),
        steps=1,
        failure=collapse,
    )
    found = table(tmp_path)
    assert (found.rows[0].seeds, found.rows[0].num_runs) == ((0,), 2)
    assert "| 1/2 |" in formats.markdown(found)


def test_runs_that_measured_nothing_have_a_table_of_their_weights(tmp_path: Path) -> None:
    add_run(tmp_path, config_of(0, restraint={}), [])
    found = rows_of(table(tmp_path, protocol=None))
    assert found["rome", "none"]["condition number"] == "42.0"
    assert found["rome", "none"]["seconds an edit"] == "0.25"


def test_the_table_of_abilities_never_shows_editing_metrics_also_where_there_were_no_tasks(
    tmp_path: Path,
) -> None:
    evals = [
        editing(step, "efficacy", 0.5, view=view)
        for step in (0, 2)
        for view in ("unrestrained", "prune")
    ]
    weights = [
        evaluation(
            step=2,
            view="prune",
            kind="weights",
            task="h.0",
            metric="l1_norm",
            value=7.0,
            stderr=None,
            n=1,
        )
    ]
    add_run(tmp_path, config_of(0, restraint={"prune": PRUNE}), evals + weights)
    found = table(tmp_path, protocol=None)
    assert [column.title for column in found.columns] == [
        "condition number",
        "L1 norm",
        "seconds an edit",
    ]
    assert rows_of(found)["rome", "prune"]["L1 norm"] == "7.0"


def test_single_edits_and_sequential_ones_share_no_table(tmp_path: Path) -> None:
    add_run(tmp_path, config_of(0, restraint={}), [editing(2, "efficacy", 0.5)])
    add_run(
        tmp_path,
        config_of(0, restraint={}, rollback=True),
        [changed(editing(2, "efficacy", 0.9), timing="rollback")],
    )
    shown = [
        each for each in summaries(subjects_in(tmp_path)) if each.is_editing and each.edits == 4
    ]
    assert len(shown) == 2
    for each in shown:
        is_alone = "each batch alone" in each.title
        assert ("each batch alone" in formats.caption(each)) == is_alone
        assert ("over all edits so far" in formats.caption(each)) != is_alone
    assert sum("each batch alone" in each.title for each in shown) == 1


def test_a_rows_label_stays_short_however_much_two_subjects_differ(tmp_path: Path) -> None:
    for number in range(2):
        more = {f"option_{letter}": number for letter in "abcdef"}
        add_run(
            tmp_path,
            config_of(0, restraint={}, name=f"experiment{number}", **more),
            evals_of(efficacy={"unrestrained": 0.1}),
        )
    assert {restraint for _, restraint in rows_of(table(tmp_path))} == {
        "none (of experiment0)",
        "none (of experiment1)",
    }


def test_latex_escapes_what_latex_would_take_for_commands(tmp_path: Path) -> None:
    add_run(
        tmp_path,
        config_of(0, restraint={"norm_cap": {"ratio": 0.1}}),
        [editing(2, "efficacy", 0.5)],
    )
    text = formats.latex(table(tmp_path))
    assert (
        r"norm\_cap" in text
        and r"\toprule" in text
        and text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
    )
    assert formats.tex("50% & a_b ± 1") == r"50\% \& a\_b $\pm$ 1"


def test_lines_are_means_with_one_standard_deviation_and_of_bounded_length(tmp_path: Path) -> None:
    found = {sheet.name: sheet for sheet in sheets(subjects_in(a_sweep(tmp_path)))}
    assert list(found) == ["weights", "editing_probability", "editing_argmax", "tasks_world"]
    (panel,) = found["editing_probability"].panels
    prune = {line.label: line for line in panel.lines}["prune"]
    assert prune.at == (0, 4)
    assert prune.mean[1] == pytest.approx(0.22 / 0.3)
    assert prune.high[1] - prune.mean[1] == pytest.approx(pandas.Series([0.7, 0.72, 0.78]).std())
    first = subjects_in(tmp_path)[0]
    steps = tuple(
        replace(first.run.steps[1], step=step, requests=("a",)) for step in range(1, 3000)
    )
    long = replace(first, run=replace(first.run, steps=steps))
    line = next(iter(sheets([long]))).panels[0].lines[0]
    assert len(line.at) <= MAX_POINTS and line.at[-1] == 2999


def test_a_line_is_called_by_what_differs_and_lines_of_different_sizes_get_a_logarithmic_axis(
    tmp_path: Path,
) -> None:
    for editor, scale in (("rome", 1.0), ("mend", 1e6)):
        folder = add_run(
            tmp_path,
            config_of(0, restraint={}, editor=editor),
            evals_of(efficacy={"unrestrained": 0.5}),
        )
        steps = (
            (folder / "steps.jsonl")
            .read_text()
            .replace('"l1_norm": 500.0', f'"l1_norm": {500.0 * scale}')
        )
        (folder / "steps.jsonl").write_text(steps)
    weights = {panel.title: panel for panel in next(iter(sheets(subjects_in(tmp_path)))).panels}
    assert [line.label for line in weights["L1 norm"].lines] == ["mend", "rome"]
    assert weights["L1 norm"].is_log
    alone = next(iter(sheets(subjects_in(tmp_path)[:1]))).panels
    assert (
        not {panel.title: panel.is_log for panel in alone}["L1 norm"]
        and alone[0].lines[0].label == "none"
    )


def test_weights_have_a_panel_for_each_model_and_generated_texts_a_sheet(tmp_path: Path) -> None:
    for model in ("tiny-gpt2", "tiny-llama"):
        for editor in ("rome", "memit"):
            config = config_of(0, restraint={}, editor=editor)
            config["model"] = {"id": f"asset:{model}", "name": model}
            texts = [editing(2, "fluency_bits", 6.2, protocol="text")]
            add_run(tmp_path, config, [*evals_of(efficacy={"unrestrained": 0.5}), *texts])
    found = {sheet.name: sheet for sheet in sheets(subjects_in(tmp_path))}
    weights = found["weights"]
    assert weights.columns == 2
    assert [panel.title for panel in weights.panels][:4] == [
        "tiny-gpt2: condition number",
        "tiny-llama: condition number",
        "tiny-gpt2: largest singular value",
        "tiny-llama: largest singular value",
    ]
    assert "tiny-llama: smallest singular value" in {panel.title for panel in weights.panels}
    assert [{line.subject for line in panel.lines} for panel in weights.panels] == [
        {"rome", "memit"}
    ] * len(weights.panels)
    (fluency,) = found["texts"].panels
    assert fluency.title == "fluency (bits)" and not fluency.is_fraction
    columns = {
        column.title: column
        for table in summaries(subjects_in(tmp_path))
        for column in table.columns
    }
    assert not columns["fluency (bits)"].is_fraction
