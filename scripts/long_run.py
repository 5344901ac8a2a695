"""A long run on random weights. It checks that time per edit, memory and checkpoints do not grow,
and that a run resumed near its end is bit-identical.

    python scripts/long_run.py --edits 10000 --width 64 --layers 4 --to FOLDER

The script edits one synthetic fact per step with MEMIT and D4S (--restraint prune: MEMIT with PRUNE
in the loop every hundred steps) and saves a checkpoint after every percent of the edits. It then
repeats the last percent from its checkpoint in a newly built model. It writes `steps.csv` (seconds
per step, resident bytes, bytes of the checkpoints) and `summary.json`. The exit code is 1 unless
the last checkpoints are identical. --shape gpt2 uses the sizes of a named model.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from editkit.bench.base import machine
from editkit.bench.edit import target_settings
from editkit.bench.shapes import Shape, model_shapes
from editkit.bench.synthetic import model_of, moments_for, requests_for
from editkit.config.schedule import Schedule
from editkit.editors.memit import Memit
from editkit.restraints.base import Restraints
from editkit.restraints.d4s import D4S
from editkit.restraints.prune import Prune
from editkit.runner.checkpoint import RunState, load_state, read_pointer, save_state
from editkit.runner.loop import run_edits
from editkit.runner.plan import Trajectory
from editkit.types import StepRecord

ENDS = 100  # steps at both ends that are compared


def shape_of(arguments: argparse.Namespace) -> Shape:
    if arguments.shape:
        return model_shapes()[arguments.shape]
    facts = {
        "model_type": "gpt2",
        "n_embd": arguments.width,
        "n_layer": arguments.layers,
        "n_head": 4,
        "vocab_size": 2000,
        "n_positions": 128,
    }
    return Shape(facts=facts, rome_layer=1, memit_layers=(0, 1))


def trajectory_of(arguments: argparse.Namespace, shape: Shape) -> Trajectory:
    """The run, on a newly built model."""
    model = model_of(shape, "random", device="cpu", dtype="float32")
    editor = Memit(
        name="memit",
        layers=shape.memit_layers,
        covariance_weight=100.0,
        spread="recomputed",
        context_lengths=((4, 2),),
        target=replace(target_settings(), steps=arguments.steps),
    )
    prune = Prune(function="linear", alpha=2.0, apply_at="every", every=100, allow_amplify=True)
    return Trajectory(
        model=model,
        editor=editor,
        restraints=Restraints(solve=D4S())
        if arguments.restraint == "d4s"
        else Restraints(totals={"prune": prune}),
        requests=requests_for(shape, arguments.edits),
        evaluators={},
        schedule=Schedule(
            edits=arguments.edits,
            batch_size=1,
            milestones=(),
            telemetry_every=arguments.telemetry_every,
            checkpoint_every=max(1, arguments.edits // 100),
        ),
        moments=moments_for(model, editor.modules(model)),
        seed=0,
        on_collapse="continue",
    )


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def run(
    trajectory: Trajectory, folder: Path, state: RunState | None = None, *, until: int | None = None
) -> list[dict[str, Any]]:
    """A row per step. Checkpoints are written to the folder."""
    rows: list[dict[str, Any]] = []
    saved, cpu = 0, time.process_time()
    for event in run_edits(trajectory, state):
        if isinstance(event, RunState):
            save_state(event, folder, {})
            saved = (folder / (read_pointer(folder) or {})["file"]).stat().st_size
            if until is not None and event.step >= until:
                return rows
        elif isinstance(event, StepRecord) and event.step:
            seconds = {f"{name}_s": round(value, 5) for name, value in event.seconds.items()}
            # CPU time does not include other processes.
            spent, cpu = time.process_time() - cpu, time.process_time()
            total = {
                "step": event.step,
                "seconds": sum(event.seconds.values()),
                "cpu_seconds": spent,
                "resident_bytes": resident_bytes(),
            }
            checkpoint = {"checkpoint_bytes": saved, "nonfinite": event.nonfinite or ""}
            rows.append(
                total
                | seconds
                | checkpoint
                | {"modules": json.dumps(event.modules, default=float) if event.modules else ""}
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edits", type=int, default=10000)
    parser.add_argument("--shape", default=None)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="losses per target search")
    parser.add_argument("--restraint", choices=("d4s", "prune"), default="d4s")
    parser.add_argument("--telemetry-every", type=int, default=10)
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    shape, started = shape_of(arguments), time.time()
    near = arguments.edits - max(1, arguments.edits // 100)
    whole, again = arguments.to / "whole", arguments.to / "again"
    rows = run(trajectory_of(arguments, shape), whole)
    seconds = time.time() - started
    with (arguments.to / "steps.csv").open("w", newline="") as file:
        writer = csv.DictWriter(
            file,
            [name for name in rows[-1] if name != "modules"],
            extrasaction="ignore",
            restval="",
        )
        writer.writeheader()
        writer.writerows(rows)
    before = sorted(whole.glob("step-*.safetensors"))[0]  # two are kept: at 99 % and the last
    assert int(before.stem.partition("-")[2]) == near, before
    again.mkdir(parents=True, exist_ok=True)
    (again / before.name).write_bytes(before.read_bytes())
    pointer = {
        "file": before.name,
        "sha256": hashlib.sha256(before.read_bytes()).hexdigest(),
        "step": near,
        "record_bytes": {},
    }
    (again / "latest.json").write_text(json.dumps(pointer))
    redone = run(trajectory_of(arguments, shape), again, load_state(again))
    last = f"step-{arguments.edits:08d}.safetensors"
    same = (whole / last).read_bytes() == (again / last).read_bytes()
    same_records = [row["modules"] for row in redone] == [row["modules"] for row in rows[near:]]

    def median(part: list[dict[str, Any]], name: str) -> float:
        return float(statistics.median(row[name] for row in part))

    third = len(rows) // 3
    parts = {"first": rows[:ENDS], "third": rows[third : third + ENDS], "last": rows[-ENDS:]}

    def medians(name: str) -> dict[str, float]:
        return {part: round(median(steps, name), 5) for part, steps in parts.items()}

    summary = {
        "command": " ".join(sys.argv),
        "edits": len(rows),
        "wall_s": round(seconds, 1),
        "seconds_an_edit": medians("seconds"),
        "cpu_seconds_an_edit": medians("cpu_seconds"),
        "resident_bytes": medians("resident_bytes"),
        "checkpoint_bytes": {
            "first": rows[len(rows) // 50]["checkpoint_bytes"],
            "largest": max(row["checkpoint_bytes"] for row in rows),
        },
        "nonfinite_steps": sum(bool(row["nonfinite"]) for row in rows),
        "resumed_at": near,
        "resumed_bytes_are_the_same": same,
        "resumed_records_are_the_same": same_records,
        "machine": machine("cpu"),
    }
    (arguments.to / "summary.json").write_text(json.dumps(summary, indent=1))
    sys.stdout.write(json.dumps(summary, indent=1) + "\n")
    return 0 if same and same_records else 1


if __name__ == "__main__":
    sys.exit(main())
