"""The curves of a training: its losses and the metrics of the validation edits, by step."""

from __future__ import annotations

import io
import math
import statistics
from pathlib import Path

from editkit.files import write_atomically
from editkit.records.reader import RunRecords, load_run
from editkit.report.figures.axes import COLOURS, UNRESTRAINED_COLOUR, dress, grid
from editkit.report.figures.run_figures import DPI

SMOOTHED = 25  # steps per point of the training curve, which is their mean


def draw_training(folder: Path) -> Path | None:
    """Draws `<folder>/figures/training.png`. Returns None before the first step. Raises ConfigError
    if the folder holds no training.
    """
    run = load_run(folder)
    steps = [step for step in run.steps if "loss" in step.target]
    if not steps:
        return None
    figure, axes = grid(3, width=3.4, height=2.6)
    for axis, metric in zip(axes, ("edit_loss", "locality_loss"), strict=False):
        parts = [steps[start : start + SMOOTHED] for start in range(0, len(steps), SMOOTHED)]
        axis.plot(
            [part[-1].step for part in parts],
            [statistics.fmean(step.target[metric] for step in part) for part in parts],
            color=COLOURS[4],
            label=f"training, means of {SMOOTHED}",
        )
        axis.plot(
            *_curve(run, "training", metric),
            color=UNRESTRAINED_COLOUR,
            marker="o",
            markersize=3,
            label="validation",
        )
        axis.set_yscale("log")
        dress(axis, title=metric.replace("_", " "), ylabel="nats")
    for index, metric in enumerate(("efficacy", "generalization", "locality")):
        curve = _curve(run, "editing", metric)
        axes[2].plot(*curve, color=COLOURS[index], marker="o", markersize=3, label=metric)
    axes[2].set_ylim(-0.02, 1.02)
    dress(axes[2], title="validation edits, each alone", ylabel="all tokens likeliest")
    for axis in axes:
        axis.set_xlabel("steps", fontsize=9)
        axis.legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    path = folder / "figures" / "training.png"
    write_atomically(path, buffer.getvalue())
    return path


def _curve(run: RunRecords, kind: str, metric: str) -> tuple[list[int], list[float]]:
    """The steps and the values of a validation metric; nan for a value that is not finite."""
    points = [
        (record.step, record.measurement.value)
        for record in run.evals
        if record.measurement.kind == kind and record.measurement.metric == metric
    ]
    return [step for step, _ in points], [math.nan if y is None else y for _, y in points]
