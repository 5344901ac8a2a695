"""Measurements of a real run are recomputed, and a number that was changed everywhere is caught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import editkit
from editkit.certify.certificate import NAME, certify
from editkit.certify.verify import verify


@pytest.mark.slow
def test_a_consistent_lie_is_caught_by_recomputing(tmp_path: Path) -> None:
    run = editkit.run(
        "editor=ft",
        "editor.steps=3",
        "restraint=prune",
        "suite=none",
        "tracker=none",
        "ledger.keep=true",
        f"paths.outputs={tmp_path}",
        edits=4,
        milestones=[2, 4],
    ).folder
    certify(run, run / NAME)
    made = verify(run / NAME, share=1.0)
    assert not made.problems and made.rerun is not None
    steps = {(unit.step, unit.view) for unit in made.rerun.units}
    assert steps == {(step, view) for step in (0, 2, 4) for view in ("unrestrained", "prune")}
    assert len(made.rerun.units) == made.rerun.possible
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    lie = next(
        line
        for line in lines
        if (line["step"], line["view"], line["metric"]) == (2, "prune", "locality")
    )
    lie["value"] = 0.5 * lie["value"] + 0.1
    (run / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    certify(run, run / NAME)
    assert not verify(run / NAME).problems  # digests alone cannot tell
    (problem,) = verify(run / NAME, share=1.0).problems
    assert "the recomputed number is another one" in problem and "locality" in problem
