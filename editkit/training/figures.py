"""The curves of a training: losses by step, and what validation edits achieve."""

from __future__ import annotations

import io
import statistics
from pathlib import Path

from editkit.files import write_atomically
from editkit.records.reader import load_run
from editkit.report.figures.axes import COLOURS, UNRESTRAINED_COLOUR, dress, grid
from editkit.report.figures.run_figures import DPI

SMOOTHED = 25  # steps that a point of the training curve is the mean of


def draw_training(folder: Path) -> Path | None:
    """Draws `<folder>/figures/training.png`; None before the first step. Raises ConfigError for a
    folder that holds no training.
    """
    run = load_run(folder)
    steps = [step for step in run.steps if "loss" in step.target]
    if not steps:
        return None
    figure, axes = grid(3, width=3.4, height=2.6)
    for axis, (name, title) in zip(
        axes, {"edit_loss": "edit loss", "locality_loss": "locality loss"}.items(), strict=False
    ):
        parts = [steps[start : start + SMOOTHED] for start in range(0, len(steps), SMOOTHED)]
        axis.plot(
            [part[-1].step for part in parts],
            [statistics.fmean(step.target[name] for step in part) for part in parts],
            color=COLOURS[4],
            label=f"training, means of {SMOOTHED}",
        )
        measured = [
            (record.step, record.measurement.value)
            for record in run.evals
            if record.measurement.kind == "training" and record.measurement.metric == name
        ]
        places, values = zip(*measured, strict=True) if measured else ((), ())
        axis.plot(
            places, values, color=UNRESTRAINED_COLOUR, marker="o", markersize=3, label="validation"
        )
        axis.set_yscale("log")
        dress(axis, title=title, ylabel="nats")
        axis.set_xlabel("steps", fontsize=9)
        axis.legend(fontsize=7, frameon=False)
    for place, metric in enumerate(("efficacy", "generalization", "locality")):
        measured = [
            (record.step, record.measurement.value)
            for record in run.evals
            if record.measurement.kind == "editing" and record.measurement.metric == metric
        ]
        places, values = zip(*measured, strict=True) if measured else ((), ())
        axes[2].plot(places, values, color=COLOURS[place], marker="o", markersize=3, label=metric)
    axes[2].set_ylim(-0.02, 1.02)
    dress(axes[2], title="validation edits, each alone", ylabel="all tokens likeliest")
    axes[2].set_xlabel("steps", fontsize=9)
    axes[2].legend(fontsize=7, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    path = folder / "figures" / "training.png"
    write_atomically(path, buffer.getvalue())
    return path
