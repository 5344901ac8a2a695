"""`editkit analyse` on a run, and its part of the page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import editkit
from editkit.analysis.write import ANALYSES, analyse
from editkit.errors import ConfigError
from editkit.report.write import report

pytestmark = pytest.mark.slow
SMALL = {"edges": 100, "steps": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six edits by fine-tuning, with a view."""
    return editkit.run(
        f"paths.outputs={tmp_path_factory.mktemp('outputs')}",
        "evaluation.timings=[milestone]",
        "ledger.keep=true",
        model="tiny-gpt2",
        editor="ft",
        restraint="prune",
        edits=6,
        milestones=[6],
        suite="none",
    ).folder


def test_every_analysis_is_written_and_shown_on_the_page(run: Path, tmp_path: Path) -> None:
    for what in ANALYSES:
        for view in (None, "prune")[: 1 + (what != "influence")]:
            path, tables = analyse(
                run, what, view=view, requests=6, options=SMALL if what == "circuit" else None
            )
            content = json.loads(path.read_text())
            assert content["view"] == (view or "unrestrained")
            assert len(content["requests"]) == 6
            assert tables and all(len(row) == len(t.head) for t in tables for row in t.rows)
            assert path.with_suffix(".png").exists() == (what != "objectives")
    report([run], tmp_path / "page")
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("<img alt=") == 2 * (len(ANALYSES) - 1) - 1
    (run / "analysis" / "lens-prune.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"lens-prune\.json: no analysis"):
        report([run], tmp_path / "page")


def test_what_cannot_be_analysed_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match="expected one of lens, update, failures, recall, circuit, influence, objectives",
    ):
        analyse(run, "heat")
    with pytest.raises(ConfigError, match="--requests: too few edits to be compared"):
        analyse(run, "recall", requests=2)
    with pytest.raises(ConfigError, match="--view: the run has no such view"):
        analyse(run, "lens", view="rect")
    with pytest.raises(ConfigError, match="--edges: no option of lens"):
        analyse(run, "lens", options={"edges": 3})
    with pytest.raises(ConfigError, match="2 problems"):
        analyse(run, "circuit", options={"edges": 0, "steps": 0})
    with pytest.raises(ConfigError, match="--requests: out of range"):
        analyse(run, "lens", requests=0)
    other = tmp_path / "seed0"
    shutil.copytree(run, other)
    (other / "ledger.jsonl").unlink()
    with pytest.raises(ConfigError, match="2 problems") as refused:
        analyse(other, "influence", view="prune")
    assert "no ledger of its edits" in str(refused.value)
    provenance = json.loads((other / "provenance.json").read_text())
    provenance["dataset"]["digest"] = "another"
    (other / "provenance.json").write_text(json.dumps(provenance))
    with pytest.raises(ConfigError, match="this is not the dataset that was edited"):
        analyse(other, "lens")
    shutil.rmtree(other / "state")
    with pytest.raises(ConfigError, match="no checkpoint"):
        analyse(other, "lens")
