"""Where the time goes: torch's own profiler over one piece of work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from editkit.lazy import torch
from editkit.resources.stopwatch import PHASE

ROWS = 15
# The parts of a step that have names of their own, each within a phase of the runner; what a phase
# does beside its parts has a name, too.
PARTS = {"target": ("texts", "prefix", "search"), "solve": ("keys", "residual")}
REST = {"target": "the rest", "solve": "least squares"}


def profiled(work: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """The phases of a step, where the work is one, in their order; then the operations that take
    the most time of their own, the costliest first. In seconds; the profiler itself slows the work
    down.
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
        each.key: (getattr(each, field) / 1e6, each.count)
        for each in averages
        if not each.key.startswith(PHASE)
    }
    total = sum(seconds for seconds, _ in own.values()) or 1.0
    costliest = sorted(own.items(), key=lambda item: -item[1][0])[:ROWS]
    operations = [
        {"operation": key, "seconds": seconds, "share": seconds / total, "calls": calls}
        for key, (seconds, calls) in costliest
    ]
    return [*_phases(averages), *operations]


def _phases(averages: Iterable[Any]) -> list[dict[str, Any]]:
    """Each with its share of the whole; the parts of a phase behind it, their names indented."""
    found = {
        each.key.removeprefix(PHASE): each
        for each in averages
        if each.key.startswith(PHASE) and each.cpu_time_total > 0
    }
    seconds = {name: each.cpu_time_total / 1e6 for name, each in found.items()}
    parts = {name: [part for part in PARTS.get(name, ()) if part in seconds] for name in seconds}
    inside = {part for each in parts.values() for part in each}
    total = sum(seconds[name] for name in seconds if name not in inside)
    rows: list[dict[str, Any]] = []
    for name in [name for name in seconds if name not in inside]:
        rows.append(
            {
                "phase": name,
                "seconds": seconds[name],
                "share": seconds[name] / total,
                "calls": found[name].count,
            }
        )
        rows += [
            {
                "phase": f"  {part}",
                "seconds": seconds[part],
                "share": seconds[part] / total,
                "calls": found[part].count,
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
                    "calls": found[name].count,
                }
            )
    return rows
