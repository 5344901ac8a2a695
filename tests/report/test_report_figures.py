"""Retention as heat maps, values on two components, and the evaluator that writes the values
down.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from editkit.errors import ConfigError
from editkit.evaluation.base import Moment, Samples
from editkit.evaluation.values import Values, values
from editkit.linalg.lowrank import LowRank
from editkit.records.find import load_runs
from editkit.records.reader import load_run
from editkit.records.writer import save_samples
from editkit.report.compare.subjects import Measured, measured
from editkit.report.figures import heatmaps, scatter
from editkit.report.figures.panels import sheets
from editkit.report.figures.run_figures import draw_routing
from editkit.report.tables import is_fraction
from editkit.targets.keys import keys_and_outputs
from editkit.types import EvalRecord, SampleRecord
from tests.support.helpers import requests, tiny_model
from tests.support.records import changed, editing
from tests.support.sweeps import PRUNE, add_run, config_of, evals_of


def subjects_in(root: Path) -> tuple[Measured, ...]:
    return measured(load_runs([root]))[0]


def blocks(values: dict[tuple[int, str], float]) -> list:
    return [
        changed(editing(step, "efficacy", value), block=block)
        for (step, block), value in values.items()
    ]


def test_a_heat_map_holds_each_block_at_each_milestone_as_the_mean_over_seeds(
    tmp_path: Path,
) -> None:
    for seed in range(2):
        found = {(1, "1-2"): 1.0, (2, "1-2"): 0.4 + 0.2 * seed, (2, "3-4"): 1.0}
        add_run(
            tmp_path, config_of(seed, restraint={}), [editing(2, "efficacy", 0.9), *blocks(found)]
        )
    (sheet,) = heatmaps.heatmaps(subjects_in(tmp_path))
    (only,) = sheet.maps
    assert (only.blocks, only.edits) == (("1-2", "3-4"), (2, 4))
    assert only.values[0] == (1.0, pytest.approx(0.5))
    assert only.values[1] == (None, 1.0)  # not yet made
    assert len(heatmaps.draw(sheet).axes) == 2  # the map and its scale
    assert 'id="figure-retention_probability"' in heatmaps.draw_interactive(sheet)


def values_run(root: Path) -> Path:
    folder = add_run(
        root,
        config_of(0, restraint={"prune": PRUNE}),
        evals_of(efficacy={"unrestrained": 0.5, "prune": 0.5}),
    )
    points = [[math.cos(place), math.sin(place), 0.0] for place in range(4)]
    for view, scale in (("unrestrained", 3.0), ("prune", 1.5)):
        rows = tuple(
            {
                "request": f"world/{place}",
                "module": "h.0",
                "current": point,
                "now": [scale * number for number in point],
            }
            for place, point in enumerate(points)
        )
        save_samples(SampleRecord(step=2, view=view, name="values", rows=rows), folder / "samples")
    return folder


def test_the_clouds_share_two_components_that_keep_distances_in_their_plane(tmp_path: Path) -> None:
    values_run(tmp_path)
    (found,) = scatter.scatters(subjects_in(tmp_path))
    assert [cloud.label for cloud in found.clouds] == [
        "right after its own edit",
        "after 4 edits",
        "after 4 edits, prune",
    ]
    assert sum(found.explained) == pytest.approx(1.0)  # the points lie in a plane
    first, second = (list(zip(cloud.x, cloud.y, strict=True)) for cloud in found.clouds[:2])
    assert math.dist(second[0], second[1]) == pytest.approx(3 * math.dist(first[0], first[1]))
    assert len(scatter.draw(found).axes[0].collections) == 3
    assert scatter.draw_interactive(found).count('"markers"') == 3


def test_a_run_whose_values_were_not_noted_after_each_edit_has_no_scatter(tmp_path: Path) -> None:
    folder = values_run(tmp_path)
    rows = tuple(
        {"request": f"world/{place}", "module": "h.0", "current": None, "now": [0.0, 1.0]}
        for place in range(4)
    )
    save_samples(
        SampleRecord(step=2, view="unrestrained", name="values", rows=rows), folder / "samples"
    )
    assert scatter.scatters(subjects_in(tmp_path)) == ()


def test_values_are_the_edited_matrixs_outputs_as_noted_then_and_as_they_are_now() -> None:
    model = tiny_model()
    (module,) = model.down_projections([1])
    model.edit([module])
    asked, evaluator = requests(3), Values(name="values", count=2, every=1)
    keys = [
        keys_and_outputs(model, request, module=module, contexts=("{}",))[0][0] for request in asked
    ]
    before = values(model, asked[:2])
    notes = evaluator.note(model, asked[:2], {}, {}, Moment(view="v", positions=(1, 2)))
    update = LowRank(torch.ones(model.weight(module).shape[0], 1), keys[0][:, None].float())
    model.apply(module, update)
    notes = evaluator.note(
        model, asked[2:], {}, notes, Moment(view="v", positions=(3,))
    )  # the third is beyond the count
    (found,) = evaluator.measure(model, asked, {}, notes, Moment(view="v", positions=(1, 2, 3)))
    assert isinstance(found, Samples) and [row["request"] for row in found.rows] == [
        request.id for request in asked[:2]
    ]
    assert torch.equal(torch.tensor([row["current"] for row in found.rows]), before)
    moved = torch.tensor(found.rows[0]["now"]) - before[0]
    torch.testing.assert_close(moved, (update.dense() @ keys[0].float()), rtol=1e-4, atol=1e-4)


def test_before_the_first_edit_and_without_notes_there_is_nothing_to_compare() -> None:
    model = tiny_model()
    model.edit(model.down_projections([1]))
    evaluator = Values(name="values", count=2, every=1)
    assert (
        evaluator.measure(
            model, requests(2), {}, {}, Moment(view="v", positions=(1, 2), is_before=True)
        )
        == []
    )
    (found,) = evaluator.evaluate(model, requests(2), {})
    assert isinstance(found, Samples) and [row["current"] for row in found.rows] == [None, None]


def test_a_count_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="count: out of range"):
        Values(name="values", count=0, every=1)


def test_routing_is_drawn_by_edits_for_each_kind_of_prompt(tmp_path: Path) -> None:
    def routing(step: int, metric: str, task: str, value: float) -> EvalRecord:
        record = changed(editing(step, metric, value), kind="routing", task=task, protocol=None)
        assert is_fraction("routing", metric) == (metric != "context_tokens")
        return record

    found = [
        routing(step, metric, task, value)
        for step in (1, 2)
        for metric, task, value in (
            ("recall", "paraphrase", 0.5),
            ("false_alarms", "neighbour", 0.1 * step),
            ("context_tokens", "prompt", 20.0),
        )
    ]
    folder = add_run(tmp_path, config_of(0, restraint={}), found)
    [sheet] = [sheet for sheet in sheets(subjects_in(tmp_path)) if sheet.name == "routing"]
    assert [panel.title for panel in sheet.panels] == [
        "recall, paraphrase",
        "false alarms, neighbour",
        "context tokens, prompt",
    ]
    assert [panel.is_fraction for panel in sheet.panels] == [True, True, False]
    [line] = sheet.panels[1].lines
    assert line.mean == (0.1, 0.2)
    figure = draw_routing(load_run(folder))
    assert figure is not None and len(figure.axes) == 3
