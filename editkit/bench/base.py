"""Options of a measurement, the timing of two implementations in turn, and their comparison."""

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
from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.resources.peak_memory import peak_memory, reset_peak_memory
from editkit.resources.runtime import unknown_device

T = TypeVar("T")
Side = Literal["plain", "ours"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command line of a measurement without its name.

    Raises:
        ConfigError: an option is out of range.
    """

    model: str  # the name of a shape
    device: str = "cpu"
    dtype: str = "float32"
    repeats: int = 3
    layers: int | None = None  # None: as many as the model has
    batch: int = 32  # requests of the MEMIT batch that is compared with single ones
    profile: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.model not in model_shapes():
            expected = f"one of {', '.join(model_shapes())}"
            problems.append(message("--shape", "unknown model", got=self.model, expected=expected))
        if self.dtype not in ("float32", "float64", "float16", "bfloat16"):
            expected = "float32, float64, float16 or bfloat16"
            problems.append(message("--dtype", "unknown dtype", got=self.dtype, expected=expected))
        problems += unknown_device(self.device, key="--device")
        problems += [
            message(f"--{name}", "out of range", got=value, expected="at least 1")
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
        """The part of the file's name that tells this measurement from those on other models,
        depths, devices and dtypes.
        """
        parts = [
            self.model,
            f"{self.shape.num_layers}layers" if self.is_reduced else "",
            "" if self.device_type == "cpu" else self.device_type,
            "" if self.dtype == "float32" else self.dtype,
        ]
        return "-".join(filter(None, parts))

    def command(self, name: str) -> str:
        """The command that repeats this measurement."""
        options = {
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
            *(f"--{key}={value}" for key, value in options.items() if value is not None),
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
    """The cost of one piece of work. CPU seconds are summed over all threads and do not include
    other processes.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int

    def without(self, share: float) -> Cost:
        return replace(
            self, seconds=self.seconds * (1 - share), cpu_seconds=self.cpu_seconds * (1 - share)
        )


@dataclass(frozen=True, kw_only=True)
class PairedTiming:
    """Timings of two implementations of the same work, made in turn.

    "plain" is the reference implementation, "ours" is editkit.
    """

    device: str
    costs: Mapping[Side, list[Cost]] = field(default_factory=lambda: {"plain": [], "ours": []})

    def run(self, side: Side, work: Callable[[], T]) -> T:
        """Does the work and records its cost."""
        cost, result = timed(work, self.device)
        self.costs[side].append(cost)
        return result

    def forget(self) -> None:
        """Drops the recorded costs, those of a warm-up."""
        for costs in self.costs.values():
            costs.clear()

    def discount(self, side: Side, seconds: float) -> None:
        """Subtracts time of the last work that does not belong to the comparison."""
        last = self.costs[side][-1]
        self.costs[side][-1] = last.without(seconds / last.seconds)

    def multiply(self, side: Side, factor: float) -> None:
        """Scales the cost of the last work, which was a part of the whole."""
        last = self.costs[side][-1]
        self.costs[side][-1] = last.without(1 - factor)

    def comparison(self, *, relative_difference: float, **more: Any) -> Comparison:
        plain, ours = self.costs["plain"], self.costs["ours"]
        plain_cpu_s, ours_cpu_s = (
            statistics.median(cost.cpu_seconds for cost in costs) for costs in (plain, ours)
        )
        return Comparison(
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
class Comparison:
    """The medians of both implementations and the relative difference of their results. `more`
    holds the other numbers of the measurement.
    """

    plain_s: float
    ours_s: float
    relative_difference: float
    # Of the process (CPU) or of the allocator (GPU), including the weights; 0: not known.
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
    """The cost of the work and its result. The GPU's queue is empty before and after."""
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


def relative_difference(reference: torch.Tensor, ours: torch.Tensor) -> float:
    """|reference - ours| / |reference| in the Frobenius norm, in float64."""
    reference, ours = reference.double(), ours.to(reference.device).double()
    difference = torch.linalg.vector_norm(reference - ours)
    return float(difference / torch.linalg.vector_norm(reference))


def machine(device: str) -> dict[str, Any]:
    """The machine and its load before the measurement."""
    return {
        "device": torch.cuda.get_device_name(device)
        if torch.device(device).type == "cuda"
        else "cpu",
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "torch": torch.__version__,
    }
