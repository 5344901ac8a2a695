"""The figures of a run: what is drawn, and how."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from editkit.records.reader import RunRecords, load_run
from editkit.report.figures.axes import UNRESTRAINED_COLOUR, colours, num_columns
from editkit.report.figures.run_figures import (
    draw_editing,
    draw_figures,
    draw_l1_norm,
    draw_spectrum,
    draw_tasks,
)
from tests.support.records import (
    EVALS,
    MODULES,
    STEPS,
    a_step,
    editing,
    evaluation,
    task,
    write_run,
)


def a_run(folder: Path, **records: list) -> RunRecords:
    return load_run(write_run(folder, **records))


def lines(axis) -> dict[str, object]:
    """The data lines of a panel by their label."""
    handles, labels = axis.get_legend_handles_labels()
    return {
        label: handle[0] if isinstance(handle, tuple) else handle
        for label, handle in zip(labels, handles, strict=True)
    }


def labels_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_run_gets_a_png_for_each_kind_of_figure_without_pyplot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    drawn = draw_figures(write_run(tmp_path))
    assert sorted(path.name for path in drawn) == [
        "editing_argmax.png",
        "editing_probability.png",
        "l1_norm.png",
        "spectrum.png",
        "tasks.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert sorted((tmp_path / "figures").iterdir()) == sorted(drawn)  # nothing half written is left


def test_generated_texts_have_a_figure_with_fluency_in_bits_and_consistency_in_percent(
    tmp_path: Path,
):
    texts = [
        editing(step, metric, value, protocol="text")
        for step in (0, 2)
        for metric, value in (("fluency_bits", 6.2), ("consistency", 0.3))
    ]
    write_run(tmp_path, evals=[*EVALS, *texts])
    assert "texts.png" in {path.name for path in draw_figures(tmp_path)}
    fluency, consistency = draw_editing(load_run(tmp_path), "text").axes
    assert fluency.get_title() == "fluency (bits)" and consistency.get_title() == "consistency"
    assert list(lines(fluency)["unrestrained"].get_ydata()) == [6.2, 6.2]
    assert list(lines(consistency)["unrestrained"].get_ydata()) == [30.0, 30.0]


def test_the_same_records_give_the_same_bytes(tmp_path: Path):
    first = [path.read_bytes() for path in draw_figures(write_run(tmp_path, evals=[]))]
    assert [path.read_bytes() for path in draw_figures(tmp_path)] == first


def test_a_run_without_measurements_gets_no_empty_figure(tmp_path: Path):
    assert [path.name for path in draw_figures(write_run(tmp_path, evals=[]))] == [
        "spectrum.png",
        "l1_norm.png",
    ]
    assert draw_figures(write_run(tmp_path / "new", steps=[], evals=[])) == ()


def test_the_spectrum_is_on_log_axes_against_edits_a_line_per_matrix(tmp_path: Path):
    figure = draw_spectrum(a_run(tmp_path))
    assert [axis.get_yscale() for axis in figure.axes] == ["log"] * 3
    assert {axis.get_xlabel() for axis in figure.axes} == {"edits"}
    drawn = lines(figure.axes[0])
    assert list(drawn) == list(MODULES)
    assert list(drawn[MODULES[1]].get_xdata()) == [0, 2, 4]  # two edits a step
    assert list(drawn[MODULES[1]].get_ydata()) == [20.0, 20.0, 900.0]


def test_the_l1_norm_has_its_own_figure(tmp_path: Path):
    (axis,) = draw_l1_norm(a_run(tmp_path)).axes
    assert list(lines(axis)[MODULES[0]].get_ydata()) == [500.0] * 3
    assert axis.get_ylabel().startswith("L1 norm")


def test_restrained_views_are_solid_and_the_unrestrained_model_is_dashed(tmp_path: Path):
    figure = draw_tasks(a_run(tmp_path))
    drawn = lines(figure.axes[0])
    assert {view: line.get_linestyle() for view, line in drawn.items()} == {
        "unrestrained": "--",
        "prune": "-",
    }
    assert drawn["unrestrained"].get_color() == UNRESTRAINED_COLOUR
    assert labels_of(figure) == ["unrestrained", "prune", "bars: ± one standard error"]


def test_one_editing_figure_holds_one_protocol(tmp_path: Path):
    run = a_run(tmp_path)
    probability, argmax = draw_editing(run, "probability"), draw_editing(run, "argmax")
    assert [axis.get_title() for axis in probability.axes] == ["efficacy", "locality"]
    assert list(lines(probability.axes[0])["prune"].get_ydata()) == [0.0, 100.0]
    assert list(lines(argmax.axes[0])["prune"].get_ydata()) == [50.0, 50.0]
    assert probability.axes[0].get_ylabel() == "probability protocol, %"


def test_error_bars_are_one_standard_error(tmp_path: Path):
    figure = draw_tasks(a_run(tmp_path))
    _, _, (bars,) = next(
        container for container in figure.axes[0].containers if container.get_label() == "prune"
    )
    assert bars.get_segments()[0].tolist() == [[0.0, 80.0], [0.0, 100.0]]


def test_a_collapse_is_marked_and_no_gap(tmp_path: Path):
    lost = replace(a_step(3, condition=(math.nan, 1.0)), nonfinite="weight of h.0.mlp.c_proj")
    steps = [*STEPS, replace(lost, modules={}), replace(lost, step=4, modules={})]
    run = a_run(
        tmp_path,
        steps=steps,
        evals=[*EVALS, editing(3, "efficacy", None), task(3, "entailment", 0.0)],
    )
    assert list(lines(draw_spectrum(run).axes[0])["not finite"].get_xdata()) == [
        6
    ]  # where it begins
    assert list(lines(draw_editing(run, "probability").axes[0])["not finite"].get_xdata()) == [6]
    assert "not finite" not in lines(draw_tasks(run).axes[0])


def test_a_restrained_views_spectrum_is_drawn_where_it_was_measured(tmp_path: Path):
    measured = [
        evaluation(
            step=step,
            view="prune",
            kind="weights",
            metric="condition_number",
            task=MODULES[0],
            value=50.0,
            stderr=None,
            n=1,
        )
        for step in (0, 2)
    ]
    figure = draw_spectrum(a_run(tmp_path, evals=EVALS + measured))
    drawn = {line.get_gid(): line for line in figure.axes[0].get_lines()}
    assert labels_of(figure) == [*MODULES, "unrestrained", "prune"], (
        "a sum of entries, not their product"
    )
    assert list(drawn[f"{MODULES[0]}, prune"].get_xdata()) == [0, 4]
    assert drawn[f"{MODULES[0]}, unrestrained"].get_linestyle() == "--"


@pytest.mark.parametrize("count", [1, 6, 7, 32])
def test_every_matrix_has_its_own_colour(count: int):
    assert len(set(colours(count))) == count


@pytest.mark.parametrize(("panels", "columns"), [(1, 1), (4, 4), (5, 3), (6, 3), (8, 4), (9, 3)])
def test_panels_fill_their_rows(panels: int, columns: int):
    assert num_columns(panels) == columns
