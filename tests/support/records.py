"""A small run's records, and its folder."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from editkit.types import EvalRecord, StepRecord, as_json

MODULES = ("h.0.mlp.c_proj", "h.1.mlp.c_proj")


def a_step(
    step: int, *, batch: int = 2, condition: tuple[float, float] = (40.0, 20.0)
) -> StepRecord:
    figures = zip(MODULES, condition, strict=True)
    return StepRecord(
        step=step,
        requests=tuple(f"world/{batch * step + index}" for index in range(batch)) if step else (),
        seconds={"target": 0.5} if step else {},
        target={"loss": 0.04} if step else {},
        modules={
            module: {
                "condition_number": value,
                "sigma_max": 4.0,
                "sigma_min": 0.1,
                "l1_norm": 500.0,
            }
            for module, value in figures
        },
    )


def evaluation(**fields: Any) -> EvalRecord:
    """A record by the keys of its line."""
    return EvalRecord.from_flat(fields)


def changed(record: EvalRecord, **fields: Any) -> EvalRecord:
    """The record with other values under some keys of its line."""
    return EvalRecord.from_flat(record.flat() | fields)


def flat(record: EvalRecord, **fields: Any) -> SimpleNamespace:
    """The keys of a record's line as attributes, some of them with other values."""
    return SimpleNamespace(**record.flat() | fields)


def editing(
    step: int,
    metric: str,
    value: float | None,
    *,
    view: str = "unrestrained",
    protocol: str = "probability",
) -> EvalRecord:
    timing = "milestone" if step else "before"
    return evaluation(
        step=step,
        view=view,
        kind="editing",
        metric=metric,
        value=value,
        stderr=0.02,
        n=10,
        protocol=protocol,
        timing=timing,
    )


def task(
    step: int, name: str, value: float, *, view: str = "unrestrained", version: int = 1
) -> EvalRecord:
    return evaluation(
        step=step,
        view=view,
        kind="downstream",
        suite="world",
        task=name,
        metric="accuracy",
        value=value,
        stderr=0.1,
        n=9,
        task_version=version,
    )


STEPS = [a_step(0), a_step(1), a_step(2, condition=(400.0, 900.0))]
EVALS = [
    record
    for step in (0, 2)
    for view in ("unrestrained", "prune")
    for record in (
        editing(step, "locality", 0.75, view=view),
        editing(step, "efficacy", 1.0 if step else 0.0, view=view),
        editing(step, "efficacy", 0.5, view=view, protocol="argmax"),
        editing(step, "efficacy_magnitude", 0.3, view=view),
        task(step, "entailment", 0.9, view=view),
    )
]


def write_run(
    folder: Path, steps: list[StepRecord] = STEPS, evals: list[EvalRecord] = EVALS
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.jsonl").write_text(
        "".join(json.dumps(as_json(record)) + "\n" for record in steps)
    )
    (folder / "evals.jsonl").write_text(
        "".join(json.dumps(as_json(record)) + "\n" for record in evals)
    )
    (folder / "config.yaml").write_text("seed: 1\nmodel:\n  id: asset:tiny-gpt2\n")
    (folder / "provenance.json").write_text('{"seed": 1}')
    return folder
