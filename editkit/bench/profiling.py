"""The profile of one piece of work, by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from editkit.lazy import torch
from editkit.resources.stopwatch import PHASE

ROWS = 15
# The named parts of a phase of the runner, and the name of the rest of the phase.
PARTS = {"target": ("texts", "prefix", "search"), "solve": ("keys", "residual")}
REST = {"target": "the rest", "solve": "least squares"}


def profiled(work: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """The phases of the work in their order, if it is a step, and the operations with the largest
    own time, the longest first. Times are in seconds and include the profiler's overhead.
    """
    is_cuda = torch.device(device).type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + (
        [torch.profiler.ProfilerActivity.CUDA] if is_cuda else []
    )
    with torch.profiler.profile(activities=kinds) as profile:
        work()
    averages = profile.key_averages()
    field = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    own = {
        average.key: (getattr(average, field) / 1e6, average.count)
        for average in averages
        if not average.key.startswith(PHASE)
    }
    total = sum(seconds for seconds, _ in own.values()) or 1.0
    longest = sorted(own.items(), key=lambda item: -item[1][0])[:ROWS]
    operations = [
        {"operation": key, "seconds": seconds, "share": seconds / total, "calls": calls}
        for key, (seconds, calls) in longest
    ]
    return [*_phases(averages), *operations]


def _phases(averages: Iterable[Any]) -> list[dict[str, Any]]:
    """Each phase with its share of the total, followed by its parts with indented names."""
    phases = {
        average.key.removeprefix(PHASE): average
        for average in averages
        if average.key.startswith(PHASE) and average.cpu_time_total > 0
    }
    seconds = {name: average.cpu_time_total / 1e6 for name, average in phases.items()}
    parts = {name: [part for part in PARTS.get(name, ()) if part in seconds] for name in seconds}
    inside = {part for names in parts.values() for part in names}
    total = sum(seconds[name] for name in seconds if name not in inside)
    rows: list[dict[str, Any]] = []
    for name in [name for name in seconds if name not in inside]:
        rows.append(
            {
                "phase": name,
                "seconds": seconds[name],
                "share": seconds[name] / total,
                "calls": phases[name].count,
            }
        )
        rows += [
            {
                "phase": f"  {part}",
                "seconds": seconds[part],
                "share": seconds[part] / total,
                "calls": phases[part].count,
            }
            for part in parts[name]
        ]
        if parts[name]:
            rest = max(seconds[name] - sum(seconds[part] for part in parts[name]), 0.0)
            rows.append(
                {
                    "phase": f"  {REST[name]}",
                    "seconds": rest,
                    "share": rest / total,
                    "calls": phases[name].count,
                }
            )
    return rows
