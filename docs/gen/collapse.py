"""Draws docs/assets/*.svg from the files of a finished ROME run with PRUNE as a view.

    python docs/gen/collapse.py outputs/demo/<run>/seed0
    python docs/gen/collapse.py outputs/prune-figure3_llama2_7b-small/<run>/seed0 --to \\
        docs/assets/real.svg

The folder's steps.jsonl gives the weights of the unrestrained model at every edit. Its evals.jsonl
gives everything else at the milestones.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

ASSETS = Path(__file__).resolve().parents[1] / "assets"
VIEWS = {"unrestrained": ("unrestrained", "#c2410c"), "prune": ("PRUNE", "#0f766e")}
# One main metric for each task
TASKS = ("solve_rate", "accuracy", "accuracy_likelihood", "exact_match", "rouge")
Line = list[tuple[int, float]]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curves(folder: Path) -> dict[str, dict[str, Line]]:
    """The four lines of each view: panel -> view -> (edits, value)."""
    steps, evals = read(folder / "steps.jsonl"), read(folder / "evals.jsonl")
    lines: dict[str, dict[str, Line]] = defaultdict(lambda: defaultdict(list))
    for step in steps:
        (weights,) = step["modules"].values()  # ROME edits one matrix
        for name in ("condition_number", "l1_norm"):
            lines[name]["unrestrained"].append((step["step"], weights[name]))
    scores: dict[tuple[str, int], list[float]] = defaultdict(list)
    for record in evals:
        view, step, metric = record["view"], record["step"], record["metric"]
        if record["kind"] == "weights" and metric in ("condition_number", "l1_norm"):
            lines[metric][view].append((step, record["value"]))
        if record["kind"] == "downstream" and metric in TASKS:
            scores[view, step].append(100 * record["value"])
        if (
            metric == "efficacy"
            and record["protocol"] == "probability"
            and not {"subset", "block"} & record.keys()
            and record["timing"] == "milestone"
        ):
            lines["efficacy"][view].append((step, 100 * record["value"]))
    for (view, step), values in scores.items():
        lines["tasks"][view].append((step, sum(values) / len(values)))
    return lines


def draw(lines: dict[str, dict[str, Line]], to: Path) -> None:
    panels = {
        "condition_number": "condition number",
        "l1_norm": "L1 norm",
        "tasks": "mean of the tasks (%)",
        "efficacy": "efficacy of all edits so far (%)",
    }
    style = {
        "font.size": 9,
        "svg.fonttype": "path",  # the same on a machine without the font
        "svg.hashsalt": "editkit",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e5e7eb",
        "axes.axisbelow": True,
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 4, figsize=(11, 2.5), layout="constrained")
        for axis, (name, title) in zip(axes, panels.items(), strict=True):
            for view, (label, color) in VIEWS.items():
                edits, values = zip(*sorted(lines[name][view]), strict=True)
                marker = "o" if len(edits) < 20 else None
                axis.plot(edits, values, label=label, color=color, marker=marker, markersize=3)
            axis.set_title(title, fontsize=9.5)
            axis.set_xlabel("edits")
            axis.set_xlim(0, 1.015 * max(edits))
            if name in ("condition_number", "l1_norm"):
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, 104)
        axes[0].legend(frameon=False, loc="upper left")
        figure.patch.set_facecolor("white")
        figure.savefig(to, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--to", type=Path, default=ASSETS / "collapse.svg")
    given = parser.parse_args()
    draw(curves(given.run), given.to)


if __name__ == "__main__":
    main()
