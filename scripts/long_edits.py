"""A long run of `editkit run`, killed at random and resumed. It checks that memory, time per edit
and checkpoints do not grow.

    python scripts/long_edits.py --edits 100000 --batch 100 --kills 3 --to FOLDER

The run is UltraEdit on a bundled model (other overrides may follow), with its process killed by
SIGKILL at random steps and started again with the same command. While it runs, its CPU time and its
resident memory are read from /proc at every new step. The result is `curve.csv` (a row for every
reading) and `summary.json`: CPU seconds an edit, resident memory and bytes of a checkpoint, each
near the beginning and at the end of the edits; the editing metrics of each milestone; and those of
the first and the last block.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from editkit.records.reader import RunRecords, load_run

SECONDS_BETWEEN = 0.1  # between two looks at the run
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def command_of(arguments: argparse.Namespace) -> list[str]:
    """The command that is started, killed and started again."""
    edits = arguments.edits
    milestones = sorted({edits * part // 20 for part in (1, 2, 5, 10, 15, 20)})
    options = [
        f"model={arguments.model}",
        "editor=ultraedit",
        f"dataset.facts={edits}",
        f"edits={edits}",
        f"batch_size={arguments.batch}",
        f"milestones=[0,{','.join(map(str, milestones))}]",
        f"evaluation.max_requests={arguments.measured}",
        f"evaluation.block_size={max(1, edits // 10)}",
        "evaluation.protocols=[probability,argmax]",
        f"telemetry.every={max(1, edits // arguments.batch // 100)}",
        f"checkpoint.every={max(1, edits // arguments.batch // 40)}",
        "suite=none",
        "tracker=none",
        "runtime.threads=1",
        f"paths.outputs={arguments.to / 'outputs'}",
        *arguments.overrides,
    ]
    return [sys.executable, "-m", "editkit", "run", *options]


def watch(
    command: list[str], folder: Path, kill_at: int | None, start: int
) -> Iterator[dict[str, Any]]:
    """Runs the command until it ends, or until its step file has reached `kill_at`. Yields a row
    for each new step: CPU seconds and resident bytes of the process.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen = -1
    while process.poll() is None:
        time.sleep(SECONDS_BETWEEN)
        step = last_step(folder)
        if step <= seen or step < 0:
            continue
        seen = step
        if reading := usage(process.pid):
            yield {"start": start, "step": step} | reading
        if kill_at is not None and step >= kill_at:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}")


def usage(pid: int) -> dict[str, float] | None:
    """The CPU seconds and resident bytes of a process; None if it has ended."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (FileNotFoundError, ProcessLookupError):
        return None
    return {
        "cpu_s": (int(after_name[11]) + int(after_name[12])) / TICKS,
        "resident_bytes": resident,
    }


def steps_file(folder: Path) -> Path | None:
    return next(folder.glob("outputs/*/*/seed*/steps.jsonl"), None)


def last_step(folder: Path) -> int:
    """The step of the last whole line, -1 without one."""
    path = steps_file(folder)
    if path is None:
        return -1
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200_000))
        lines = [line for line in file.read().split(b"\n")[:-1] if line.startswith(b'{"step"')]
    return int(json.loads(lines[-1])["step"]) if lines else -1


def summary_of(
    arguments: argparse.Namespace, rows: list[dict[str, Any]], kills: list[int], run: RunRecords
) -> dict[str, Any]:
    """What the run took at its beginning and its end, and what it holds."""
    batch, last = arguments.batch, len(run.steps) - 1
    window = max(1, arguments.window // batch)
    measured = {record.step for record in run.evals}

    def cpu_an_edit(first: int, end: int) -> float:
        """Of the steps in between that are neither measured nor repeated."""
        spent = [
            (after["cpu_s"] - before["cpu_s"]) / (after["step"] - before["step"]) / batch
            for before, after in itertools.pairwise(rows)
            if before["start"] == after["start"]
            and first <= before["step"]
            and after["step"] <= end
            and not measured & set(range(before["step"], after["step"] + 1))
        ]
        return round(statistics.median(spent), 6) if spent else float("nan")

    def resident(first: int, end: int) -> int:
        found = [row["resident_bytes"] for row in rows if first <= row["step"] <= end]
        return int(statistics.median(found)) if found else 0

    ends = {"first": (1, 1 + window), "last": (last - window, last)}
    metrics: dict[str, Any] = {}
    blocks: dict[str, Any] = {}
    for record in run.evals:
        named, value = record.measurement, record.measurement.value
        if named.kind != "editing" or named.subset or named.task:
            continue
        if named.metric not in ("efficacy", "generalization", "locality"):
            continue
        key = f"{named.protocol} {named.metric}"
        if named.block is None:
            metrics.setdefault(str(record.step * batch), {})[key] = value
        elif record.step == max(measured):
            blocks.setdefault(named.block, {})[key] = value
    states = sorted(run.folder.glob("state/step-*.safetensors"))
    return {
        "command": " ".join(command_of(arguments)[1:]).replace(str(arguments.to), "FOLDER"),
        "edits": sum(len(step.requests) for step in run.steps),
        "killed_at_steps": kills,
        "cpu_seconds_an_edit": {name: cpu_an_edit(*end) for name, end in ends.items()},
        "resident_bytes": {
            "after_a_tenth": resident(last // 10, last // 10 + window),
            "last": resident(*ends["last"]),
        },
        "checkpoint_bytes": {path.stem: path.stat().st_size for path in states},
        "record_bytes": {
            name: (run.folder / name).stat().st_size for name in ("steps.jsonl", "evals.jsonl")
        },
        "nonfinite_steps": sum(step.nonfinite is not None for step in run.steps),
        "by_edits": metrics,
        "by_block_at_the_last_milestone": blocks,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--edits", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--model", default="tiny-llama")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--measured", type=int, default=1000, help="requests at a milestone")
    parser.add_argument("--window", type=int, default=1000, help="edits at both ends")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", help="further overrides of editkit run")
    arguments = parser.parse_args()
    steps = -(-arguments.edits // arguments.batch)
    kills = sorted(random.Random(arguments.seed).sample(range(1, steps), arguments.kills))
    rows: list[dict[str, Any]] = []
    arguments.to.mkdir(parents=True, exist_ok=True)
    with (arguments.to / "curve.csv").open("w", newline="", buffering=1) as file:
        writer = csv.DictWriter(file, ["start", "step", "cpu_s", "resident_bytes"])
        writer.writeheader()
        for start, kill_at in enumerate([*kills, None]):
            for row in watch(command_of(arguments), arguments.to, kill_at, start):
                writer.writerow(row)
                rows.append(row)
    path = steps_file(arguments.to)
    assert path is not None, "the run has ended and has a step file"
    summary = summary_of(arguments, rows, kills, load_run(path.parent))
    text = json.dumps(summary, indent=1) + "\n"
    (arguments.to / "summary.json").write_text(text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
