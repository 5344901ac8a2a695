"""What every measurement shares: its options, a stopwatch for two ways in turn, and what it
found.
"""

from __future__ import annotations

import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

from editkit.bench.shapes import Shape, model_shapes
from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.resources.peak_memory import peak_memory, reset_peak_memory

T = TypeVar("T")
Side = Literal["plain", "ours"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure on: a command line, but for the measurement's name."""

    model: str  # name of a shape
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 3
    layers: int | None = None  # None: as many as the model has
    batch: int = 32  # requests of the MEMIT batch that is compared with single ones
    profile: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.model not in model_shapes():
            problems.append(
                f"--shape: no such model - given {self.model!r} - allowed: {', '.join(model_shapes())}"
            )
        if self.dtype not in ("float32", "float64", "float16", "bfloat16"):
            problems.append(
                f"--dtype: given {self.dtype!r} - allowed: float32, float64, float16, bfloat16"
            )
        problems += [
            f"--{name}: at least one is needed - given {value} - allowed: 1 or more"
            for name, value in (("repeats", self.repeats), ("batch", self.batch))
            if value < 1
        ]
        if problems:
            raise ConfigError(problems)

    @property
    def shape(self) -> Shape:
        return model_shapes()[self.model].of_depth(self.layers)

    @property
    def is_reduced(self) -> bool:
        return self.shape.num_layers < model_shapes()[self.model].num_layers

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    def label(self) -> str:
        """Tells this measurement's file from those of other options that change what is
        measured.
        """
        parts = [
            self.model,
            f"{self.shape.num_layers}layers" if self.is_reduced else "",
            "" if self.device_type == "cpu" else self.device_type,
            "" if self.dtype == "float32" else self.dtype,
        ]
        return "-".join(filter(None, parts))

    def command(self, name: str) -> str:
        """The command that makes this measurement again."""
        given = {
            "shape": self.model,
            "device": self.device,
            "dtype": self.dtype,
            "repeats": self.repeats,
            "layers": self.layers,
        }
        words = [
            "editkit",
            "bench",
            name,
            *(f"--{key}={value}" for key, value in given.items() if value is not None),
        ]
        threads = (
            [f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"]
            if "OMP_NUM_THREADS" in os.environ
            else []
        )
        return " ".join(
            [
                *threads,
                shlex.join(
                    [*words, f"--batch={self.batch}", *(["--profile"] if self.profile else [])]
                ),
            ]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one piece of work took. CPU seconds, of all threads, do not count what other processes
    took of the cores.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int

    def without(self, share: float) -> Cost:
        return replace(
            self, seconds=self.seconds * (1 - share), cpu_seconds=self.cpu_seconds * (1 - share)
        )


@dataclass(frozen=True, kw_only=True)
class Race:
    """Two ways of the same work, timed in turn, so that a busy machine slows both."""

    device: str
    costs: Mapping[Side, list[Cost]] = field(default_factory=lambda: {"plain": [], "ours": []})

    def run(self, side: Side, work: Callable[[], T]) -> T:
        """Does the work and notes what it took."""
        cost, result = timed(work, self.device)
        self.costs[side].append(cost)
        return result

    def forget(self) -> None:
        """Drops what was noted so far: a run to warm up."""
        for costs in self.costs.values():
            costs.clear()

    def discount(self, side: Side, seconds: float) -> None:
        """Takes back time of the last run that does not belong to what is compared."""
        last = self.costs[side][-1]
        self.costs[side][-1] = last.without(seconds / last.seconds)

    def multiply(self, side: Side, factor: float) -> None:
        """Takes the last run for a part of the work, of which the whole is so many."""
        last = self.costs[side][-1]
        self.costs[side][-1] = last.without(1 - factor)

    def found(self, *, relative_difference: float, **more: Any) -> Found:
        plain, ours = self.costs["plain"], self.costs["ours"]
        plain_cpu_s, ours_cpu_s = (
            statistics.median(cost.cpu_seconds for cost in costs) for costs in (plain, ours)
        )
        return Found(
            plain_s=statistics.median(cost.seconds for cost in plain),
            ours_s=statistics.median(cost.seconds for cost in ours),
            relative_difference=relative_difference,
            plain_peak_bytes=max(cost.peak_bytes for cost in plain),
            ours_peak_bytes=max(cost.peak_bytes for cost in ours),
            more={
                "plain_cpu_s": plain_cpu_s,
                "ours_cpu_s": ours_cpu_s,
                "cpu_ratio": plain_cpu_s / ours_cpu_s,
                "all_plain_s": [cost.seconds for cost in plain],
                "all_ours_s": [cost.seconds for cost in ours],
            }
            | more,
        )


@dataclass(frozen=True, kw_only=True)
class Found:
    """Medians of both ways, and how far apart their results are; `more` is what this measurement
    has beside it.
    """

    plain_s: float
    ours_s: float
    relative_difference: float
    # of the process (CPU) or the allocator (GPU), the weights included; 0: not known
    plain_peak_bytes: int
    ours_peak_bytes: int
    more: Mapping[str, Any]

    def as_json(self) -> dict[str, Any]:
        return {
            "plain_s": self.plain_s,
            "ours_s": self.ours_s,
            "ratio": self.plain_s / self.ours_s,
            "relative_difference": self.relative_difference,
            "plain_peak_bytes": self.plain_peak_bytes,
            "ours_peak_bytes": self.ours_peak_bytes,
        } | dict(self.more)


def timed(work: Callable[[], T], device: str) -> tuple[Cost, T]:
    """What the work took, and its result; the GPU's queue is empty before and after."""
    synchronise(device)
    reset_peak_memory(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    result = work()
    synchronise(device)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return Cost(seconds=seconds, cpu_seconds=cpu_seconds, peak_bytes=peak_memory(device)), result


def synchronise(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def relative_difference(plain: torch.Tensor, ours: torch.Tensor) -> float:
    """|plain - ours| / |plain|, Frobenius, in float64."""
    plain, ours = plain.double(), ours.to(plain.device).double()
    return float(torch.linalg.vector_norm(plain - ours) / torch.linalg.vector_norm(plain))


def machine(device: str) -> dict[str, Any]:
    """What the times depend on; the load is that before the measurement."""
    return {
        "device": torch.cuda.get_device_name(device)
        if torch.device(device).type == "cuda"
        else "cpu",
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "torch": torch.__version__,
    }
