"""Where the time goes: torch's own profiler over one piece of work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from editkit.lazy import torch

ROWS = 15


def profiled(work: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """The operations that take the most time of their own, in seconds, the costliest first. The profiler itself slows the work down."""
    is_cuda = torch.device(device).type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if is_cuda else [])
    with torch.profiler.profile(activities=kinds) as profile:
        work()
    field = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    found = [{"operation": each.key, "seconds": getattr(each, field) / 1e6, "calls": each.count} for each in profile.key_averages()]
    return sorted(found, key=lambda row: -float(row["seconds"]))[:ROWS]
