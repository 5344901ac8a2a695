"""The W&B dashboard's panels, and W&B's own sweeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from editkit.config.build import build
from editkit.config.compose import compose, conf_folder
from editkit.records.find import load_runs
from editkit.records.reader import load_run
from editkit.trackers.history import rows
from editkit.wandb.client import read_marker
from editkit.wandb.dashboard import definition, workspace
from tests.support.wandb_log import logged
from tests.support.wandb_runs import (
    cell,
    tracker,
    watch,
)

pytest.importorskip("wandb", reason="wandb is not installed: the extra 'wandb'")


def test_the_dashboard_has_the_papers_panels_against_edits_grouped_by_restraint(
    tmp_path: Path,
) -> None:
    pytest.importorskip("wandb_workspaces")
    runs = load_runs([cell(tmp_path)])
    made = definition(workspace(runs, project="editkit", entity="me", name="papers"))["spec"][
        "section"
    ]
    panels = {
        panel["config"]["chartTitle"]: panel["config"]
        for section in made["panelBankConfig"]["sections"]
        for panel in section["panels"]
    }
    assert {panel["xAxis"] for panel in panels.values()} == {"edit/edits"}
    assert [each["name"] for each in made["runSets"][0]["grouping"]] == [
        "label_model.value",
        "label_editor.value",
        "label_restraint.value",
    ]
    import re

    keys = {
        name
        for row in rows(runs[0].steps, runs[0].evals, trajectory="unrestrained").values()
        for name in row
    }
    for title in (
        "condition number (PRUNE, Figure 2)",
        "L1 norm (D4S and EAC: it grows with the edits)",
        "efficacy",
        "entailment: accuracy",
    ):
        assert any(re.search(panels[title]["metricRegex"], key) for key in keys), title
    sections = [section["name"] for section in made["panelBankConfig"]["sections"]]
    assert "Editing, protocol probability" in sections and "Editing, protocol argmax" in sections


def test_the_sweep_file_is_what_wandb_agent_takes_and_every_cell_builds(tmp_path: Path) -> None:
    from itertools import cycle, islice

    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml.safe_load((conf_folder() / "wandb_sweep.yaml").read_text())
    choices = {
        name: given.get("values", [given.get("value")])
        for name, given in sweep["parameters"].items()
    }
    for values in islice(
        zip(*map(cycle, choices.values()), strict=True), max(map(len, choices.values()))
    ):  # each value once at least
        args = {name: {"value": value} for name, value in zip(choices, values, strict=True)}
        replaced = create_sweep_command_args({"args": args})
        command = [
            part
            for word in create_sweep_command(sweep["command"])
            for part in (replaced.get(word.strip("${}"), [word]) if "$" in word else [word])
        ]
        assert command[:3] == ["editkit", "run", "tracker=wandb"]
        composed = compose([*command[2:], f"paths.outputs={tmp_path}"])
        experiment = build(composed.config, choices=composed.choices)
        assert experiment.seed == args["seed"]["value"]


def test_inside_a_sweep_the_agents_id_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    run = cell(tmp_path)
    watch(tracker(), run)
    assert logged(run)[0].run.run_id == "chosen" == read_marker(run)["id"]
    assert load_run(run).status == "unfinished"
