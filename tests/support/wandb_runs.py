"""Runs for the W&B tests: a folder as a run leaves it, a tracker that watches it, and the logged
numbers in a form to compare."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import yaml

from editkit.records.tracker import AbstractTracker, RunInfo
from editkit.trackers.none import Silent
from editkit.types import SampleRecord
from editkit.wandb.tracker import Wandb
from tests.support.records import EVALS, STEPS, write_run

CONFIG: dict[str, Any] = {
    "name": "tiny-rome",
    "experiment_name": "table",
    "model": {"name": "tiny-gpt2", "id": "asset:tiny-gpt2"},
    "editor": {"name": "rome"},
    "restraint": {"eac": {}, "prune": {"apply_at": "evaluation"}},
    "dataset": {"name": "world"},
    "suite": {"name": "paper"},
}


SAMPLES = SampleRecord(
    step=2,
    view="prune",
    name="paper-gsm8k",
    rows=tuple({"prompt": "1 + 1?", "output": 2, "ids": [1, 2]} for _ in range(9)),
)


class Listener(Silent):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def open(self, run: RunInfo) -> None:
        self.heard.append("open")

    def step(self, record) -> None:
        self.heard.append("step")

    def samples(self, record) -> None:
        self.heard.append("samples")

    def warning(self, text: str) -> None:
        self.heard.append(text)

    def close(self, status) -> None:
        self.heard.append(f"closed: {status}")


def tracker(beside: AbstractTracker | None = None, **options: Any) -> Wandb:
    given = {
        "mode": "offline",
        "project": "editkit",
        "entity": None,
        "job_type": "edit",
        "tags": ("mine",),
        "max_samples": 5,
    }
    return Wandb(
        beside=beside or Listener(),
        **(given | {"figures": True, "artifacts": False, "timeout_s": 30.0} | options),
    )


def cell(folder: Path, **records: Any) -> Path:
    run = write_run(folder / "table" / "tiny-rome-0123" / "seed1", **records)
    (run / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (run / "figures").mkdir(exist_ok=True)
    pixel = "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    pixel += "0000000c49444154789c63f8ffff3f0005fe02fe0def46b80000000049454e44ae426082"
    (run / "figures" / "spectrum.png").write_bytes(bytes.fromhex(pixel))
    (run / "state").mkdir(exist_ok=True)
    (run / "state" / "step-00000002.safetensors").write_bytes(b"delta")
    (run / "state" / "latest.json").write_text(
        json.dumps({"file": "step-00000002.safetensors", "step": 2})
    )
    return run


def watch(watching: AbstractTracker, run: Path, *, resumed_at: int = 0, status="done") -> None:
    views = ("unrestrained", "prune")
    watching.open(
        RunInfo(
            name="tiny-rome",
            folder=run,
            edits=4,
            batch_size=2,
            views=views,
            config=CONFIG,
            resumed_at=resumed_at,
        )
    )
    for step in STEPS[resumed_at and resumed_at + 1 :]:
        watching.step(step)
        for record in EVALS:
            if record.step == step.step:
                watching.evaluation(record)
        if SAMPLES.step == step.step:
            watching.samples(SAMPLES)
    watching.close(status)


def numbers(history: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """The plain numbers of a logged history by step, without W&B's own."""
    return {
        row["_step"]: {
            name: value
            for name, value in row.items()
            if isinstance(value, int | float) and not name.startswith("_") and "/_" not in name
        }
        for row in history
    }


def plain(history: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    return {
        step: {name: value for name, value in row.items() if not math.isnan(value)}
        for step, row in history.items()
    }


def without_media(history: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    media = ("figures/", "samples/", "evaluations")
    return {
        step: {name: value for name, value in row.items() if not name.startswith(media)}
        for step, row in history.items()
    }
