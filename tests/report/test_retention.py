"""What a report makes of protocols and timings: retention, collapse points, protocols side by side;
nothing is mixed.
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from editkit.errors import ConfigError
from editkit.evaluation.thresholds import Thresholds
from editkit.records.reader import load_run
from editkit.report.compare.collapse import collapse_points, thresholds_of
from editkit.report.figures.retention import draw_retention, retention, retention_protocols
from editkit.report.figures.run_figures import draw_figures
from editkit.report.protocols import compare_protocols, markdown, texts
from editkit.report.show import show
from editkit.report.tables import caption, is_summarised, summarise
from editkit.types import EvalRecord
from tests.support.records import EVALS, STEPS, changed, editing, evaluation, task, write_run

EDITS = {0: 0, 1: 2, 2: 4}


def part(
    step: int,
    block: str,
    value: float | None,
    *,
    metric: str = "efficacy",
    view: str = "unrestrained",
) -> EvalRecord:
    return changed(editing(step, metric, value, view=view, protocol="argmax"), block=block)


BLOCKS = [
    part(0, "1-2", 0.0),
    part(0, "3-4", 0.1),
    part(1, "1-2", 1.0),
    part(2, "3-4", 0.9),
    part(2, "1-2", None),
]


def test_retention_has_a_row_for_each_block_and_a_column_for_each_milestone() -> None:
    found = retention(
        [*EVALS, *BLOCKS], EDITS, protocol="argmax", metric="efficacy", view="unrestrained"
    )
    assert found is not None
    assert (found.blocks, found.edits) == (("1-2", "3-4"), (0, 2, 4))
    assert found.values == ((0.0, 1.0, None), (0.1, None, 0.9))
    assert (
        retention(EVALS, EDITS, protocol="argmax", metric="efficacy", view="unrestrained") is None
    )
    late = [part(1, "101-150", 1.0), part(1, "51-100", 1.0)]
    ordered = retention(late, EDITS, protocol="argmax", metric="efficacy", view="unrestrained")
    assert ordered is not None and ordered.blocks == ("51-100", "101-150"), (
        "as edits are counted, not as text"
    )


def test_the_heat_map_has_a_panel_for_each_metric_and_view(tmp_path: Path) -> None:
    evals = [
        changed(record, view=view)
        for view in ("unrestrained", "prune")
        for record in (*BLOCKS, part(2, "1-2", 0.5, metric="locality_out_of_distribution"))
    ]
    figure = draw_retention(evals, EDITS, "argmax")
    assert figure is not None
    panels = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in panels] == [
        f"{metric}, {view}"
        for metric in ("efficacy", "locality_out_of_distribution")
        for view in ("unrestrained", "prune")
    ]
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["0", "2", "4"]
    assert {text.get_text() for text in panels[0].texts} == {"0", "10", "100", "90"}, (
        "percent; nothing where nothing was measured"
    )
    drawn = draw_figures(write_run(tmp_path, evals=[*EVALS, *evals]))
    assert "retention_argmax.png" in {path.name for path in drawn}
    assert retention_protocols(EVALS) == () and draw_retention(EVALS, EDITS, "argmax") is None


def test_collapse_points_lie_between_two_milestones_and_name_their_threshold() -> None:
    perplexities = [
        evaluation(
            step=step,
            view="unrestrained",
            kind="language",
            metric="perplexity_per_token",
            value=value,
            stderr=None,
            n=3,
            task="wiki",
        )
        for step, value in ((0, 10.0), (1, 19.0), (2, None))
    ]
    evals = [
        *(editing(step, "efficacy", value) for step, value in ((0, 0.0), (1, 0.9), (2, 0.3))),
        *(
            editing(step, "efficacy", value, protocol="argmax")
            for step, value in ((1, 0.4), (2, 0.9))
        ),
        *(task(step, "rte", value) for step, value in ((0, 0.8), (1, 0.5), (2, 0.39))),
        *(task(step, "gsm8k", 0.0) for step in (0, 1, 2)),
        *perplexities,
    ]
    found = {
        point.name: (point.sound_at, point.edits)
        for point in collapse_points(evals, EDITS, Thresholds())
    }
    assert found == {
        "edits until efficacy (probability) < 0.5": (2, 4),
        "edits until efficacy (argmax) < 0.5": (None, 2),
        "edits until rte accuracy < 0.5 x unedited": (2, 4),
        "edits until wiki perplexity > 2.0 x unedited": (2, 4),  # not finite is beyond
    }
    never = list(collapse_points(evals, EDITS, Thresholds(efficacy=0.1, task=0.1)))
    assert [str(point) for point in never[:1]] == [
        "edits until efficacy (probability) < 0.1, unrestrained: more than 4"
    ]


def test_edits_that_are_taken_back_have_no_collapse_points() -> None:
    evals = [
        editing(0, "efficacy", 0.0),
        changed(editing(1, "efficacy", 0.1), timing="rollback"),
        task(0, "rte", 0.8),
        task(1, "rte", 0.1),
    ]
    assert list(collapse_points(evals, EDITS, Thresholds())) == []
    assert list(collapse_points(evals[2:], EDITS, Thresholds())) != []


def test_thresholds_are_those_of_the_runs_configuration() -> None:
    assert thresholds_of(
        {"evaluation": {"thresholds": {"efficacy": 0.9, "task": 0.2, "perplexity": 3.0}}}
    ) == Thresholds(efficacy=0.9, task=0.2, perplexity=3.0)
    assert thresholds_of({}) == thresholds_of({"evaluation": {}}) == Thresholds()
    with pytest.raises(ConfigError, match=r"task: must be positive \(got 0"):
        Thresholds(task=0)


def test_protocols_stand_side_by_side_and_never_in_one_column() -> None:
    immediate = changed(editing(2, "efficacy", 0.95), timing="immediate")
    divergence = editing(2, "locality_kl_nats", 1.5, protocol="distribution")
    final = changed(editing(2, "efficacy", 1.0), timing="final")
    found = compare_protocols([*EVALS, immediate, divergence, final, *BLOCKS], EDITS)
    assert found is not None and (found.view, found.edits) == ("unrestrained", 4)
    assert found.protocols == ("probability", "argmax", "distribution")
    rows = dict(zip(found.rows, texts(found), strict=True))
    assert rows["efficacy"] == ["100.0", "50.0", "-"]
    assert rows["efficacy, immediate"] == ["95.0", "-", "-"]
    assert rows["locality kl nats"] == ["-", "-", "1.5"], "in its own unit"
    assert next(
        iter(rows)
    ) == "efficacy" and "| efficacy | 100.0 ± 2.0 | 50.0 ± 2.0 | - |" in markdown(found)
    assert compare_protocols([], EDITS) is None
    with pytest.raises(ConfigError, match="measured twice"):
        compare_protocols([*EVALS, editing(2, "efficacy", 0.1)], EDITS)


def test_a_milestones_row_holds_the_whole_and_no_part_distance_or_loss() -> None:
    whole = editing(2, "efficacy", 1.0)
    assert is_summarised(whole)
    for other in (
        changed(whole, block="1-2"),
        changed(whole, subset="succeeded"),
        changed(whole, timing="immediate"),
        changed(whole, timing="final"),
        changed(whole, metric="efficacy_forgetting"),
        changed(whole, metric="locality_kl_nats"),
        changed(whole, metric="efficacy_magnitude"),
    ):
        assert not is_summarised(other), other


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("aggregation", "prompt"),
        ("context", "Q: {}"),
        ("max_new_tokens", 9),
        ("dataset", "other"),
        ("timing", "rollback"),
    ],
)
def test_a_column_never_mixes_ways_of_measuring(field: str, value: object) -> None:
    evals = [editing(1, "efficacy", 0.5), changed(editing(2, "efficacy", 0.5), **{field: value})]  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="one column of the table would mix"):
        summarise(STEPS, evals, edits=EDITS, protocol="probability")


def test_batches_that_were_taken_back_are_said_to_be() -> None:
    evals = [editing(0, "efficacy", 0.0), changed(editing(2, "efficacy", 0.5), timing="rollback")]
    table = summarise(STEPS, evals, edits=EDITS, protocol="probability")
    assert table.has_rollback and [row.edits for row in table.rows] == [0, 4]
    assert "tasks, perplexity and weights with a row's last batch alone" in caption(table)
    assert "batch alone" not in caption(
        summarise(STEPS, EVALS, edits=EDITS, protocol="probability")
    )


def test_show_prints_protocols_and_collapse_points(tmp_path: Path) -> None:
    evals = [*EVALS, editing(1, "efficacy", 0.2)]
    folder = write_run(tmp_path, evals=evals)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(show(folder, protocol="all"))
    text = console.export_text()
    assert "argmax" in text and "edits until efficacy (probability) < 0.5, unrestrained: 2" in text
    assert load_run(folder).evals == tuple(evals)
