"""Whether a run, or a training, fits into memory, before anything is loaded:
`editkit.resources.footprint` counts the bytes; this file compares them and advises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.architecture import Architecture, architecture_of
from editkit.resources.footprint import (
    Demand,
    Footprint,
    Trained,
    outline_of,
    run_footprint,
    training_footprint,
)

if TYPE_CHECKING:
    from editkit.model.load import ModelConfig

GB = 1e9
PROGRAM = {"cpu": 0.57e9, "cuda": 0.6e9}  # a CUDA context takes memory beside torch's allocator


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Bytes by what they are for, in one place (a device, or the host)."""

    program: float = 0.0
    weights: float = 0.0
    masters: float = 0.0
    statistics: float = 0.0
    hypernetwork: float = 0.0
    beside: float = 0.0
    working: float = 0.0

    def by_name(self) -> dict[str, float]:
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @property
    def total(self) -> float:
        return sum(self.by_name().values())

    def __str__(self) -> str:
        parts = ", ".join(
            f"{name} {size / GB:.2g}" for name, size in self.by_name().items() if size
        )
        return f"{self.total / GB:.3g} GB ({parts})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run takes at its peak."""

    device: str
    on_device: Parts
    # Beside a GPU, whose weights are loaded straight onto it; empty for another device.
    on_host: Parts
    disk: float  # of second moments, stored or mapped
    phases: Mapping[str, float]  # the candidates for `working`
    limit: float | None  # of the device: runtime.memory_gb, or the free memory; None: unknown
    advice: tuple[str, ...]
    # Of the host beside a GPU: its free memory; None: unknown, as for a GPU of another machine.
    host_limit: float | None = None
    host_advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return _fits(self.on_device, self.limit) and _fits(self.on_host, self.host_limit)

    def rows(self) -> list[tuple[str, str]]:
        """For a listing."""
        phases = ", ".join(f"{name} {size / GB:.2g}" for name, size in self.phases.items())
        compared = _compared(self.on_device, self.limit)
        rows = [("memory", f"about {self.on_device} on {self.device}{compared}")]
        rows.append(("  working", f"the largest of {phases} GB"))
        if self.on_host.total:
            compared = _compared(self.on_host, self.host_limit)
            rows.append(("  on the host", f"{self.on_host}{compared}"))
        return rows

    def problems(self) -> list[str]:
        """Why it cannot run here, and what to do about it."""
        problems = []
        if not _fits(self.on_device, self.limit):
            advice = "; ".join(self.advice) or "a smaller model"
            problems.append(
                message(
                    "runtime.memory_gb",
                    f"{self.device} has {(self.limit or 0) / GB:.3g} GB, the run would take about "
                    f"{self.on_device}",
                    fix=f"{advice}; or runtime.memory_gb=<number> if this is known to be wrong",
                )
            )
        if not _fits(self.on_host, self.host_limit):
            advice = "; ".join(self.host_advice) or "a machine with more memory"
            problems.append(
                message(
                    "runtime.device",
                    f"beside {self.device} the host has {(self.host_limit or 0) / GB:.3g} GB free, "
                    f"the run would keep about {self.on_host} there",
                    fix=advice,
                )
            )
        return problems


def _fits(parts: Parts, limit: float | None) -> bool:
    return limit is None or parts.total <= limit


def _compared(parts: Parts, limit: float | None) -> str:
    if limit is None:
        return ""
    return f"; {limit / GB:.3g} GB there{'' if _fits(parts, limit) else ': DOES NOT FIT'}"


def estimated(
    demand: Demand, *, facts: Mapping[str, Any] | None = None, training: Trained | None = None
) -> Estimate | None:
    """The estimate; None if the model's sizes are not known here.

    Args:
        facts: the model's config.json; None: what is known without a download.
        training: the editor, for the estimate of its training and not of a run.

    Raises:
        ConfigError: the model has no layer of a number that the editor chose.
    """
    architecture = architecture_without_download(demand.model, facts)
    if architecture is None:
        return None
    try:
        if training is not None:
            footprint = training_footprint(demand, training, architecture)
        else:
            footprint = run_footprint(demand, architecture)
    except AttributeError:  # a user's editor that needs more of a model than its names
        return None
    return _estimate(demand, footprint, architecture, is_training=training is not None)


def edited(demand: Demand) -> tuple[str, ...] | None:
    """The edited matrices; None if the model's sizes are not known here. Raises as `estimated`."""
    architecture = architecture_without_download(demand.model)
    if architecture is None:
        return None
    return demand.editor.modules(outline_of(demand.model, architecture))


def architecture_without_download(
    model: ModelConfig, facts: Mapping[str, Any] | None = None
) -> Architecture | None:
    """The sizes of a model; None if only the hub knows them, or their names are unknown here."""
    facts = facts or model.facts()
    try:
        return None if facts is None else architecture_of(facts)
    except KeyError:
        return None


def _estimate(
    demand: Demand, counted: Footprint, architecture: Architecture, *, is_training: bool
) -> Estimate:
    runtime = demand.runtime
    is_gpu, keeps_base = runtime.is_gpu, runtime.base_at == "device"
    keeps_moments = runtime.statistics_at == "device"
    moments = counted.moments if keeps_moments else 0.0
    on_device = Parts(
        program=PROGRAM["cuda" if is_gpu else "cpu"],
        weights=counted.weights,
        masters=counted.totals + (counted.base if keeps_base else 0),
        statistics=moments + counted.history.kept,
        hypernetwork=counted.editor + (0 if is_gpu else counted.waiting),
        beside=counted.beside,
        working=max(*counted.phases.values(), counted.history.working),
    )
    on_host = Parts(
        program=PROGRAM["cpu"],
        masters=0 if keeps_base else counted.base,
        statistics=counted.moments if runtime.statistics_at == "cpu" else 0,
        hypernetwork=counted.waiting,
        working=counted.copied,
    )
    advice = _advice(
        demand,
        counted,
        moments=moments,
        base=counted.base if keeps_base else 0.0,
        half_of_weights=architecture.num_parameters * 2,
        is_training=is_training,
    )
    return Estimate(
        device=runtime.device,
        on_device=on_device,
        on_host=on_host if is_gpu else Parts(),
        disk=counted.stored,
        phases=counted.phases,
        limit=_limit(demand),
        advice=tuple(advice),
        host_advice=tuple(_host_advice(on_host)),
    )


def _limit(demand: Demand) -> float | None:
    if demand.runtime.memory_gb is not None:
        return demand.runtime.memory_gb * GB
    return None if demand.runtime.is_gpu else available()


def _advice(
    demand: Demand,
    counted: Footprint,
    *,
    moments: float,
    base: float,
    half_of_weights: float,
    is_training: bool,
) -> list[str]:
    is_gpu, advice = demand.runtime.is_gpu, []
    if demand.model.dtype == "float32":
        advice.append(f"model.dtype=bfloat16 (saves {half_of_weights / GB:.2g} GB)")
    if moments and is_gpu:
        advice.append(f"runtime.statistics=cpu or disk (saves {moments / GB:.2g} GB)")
    if moments and demand.solve_dtype == "float64":
        advice.append("solve.dtype=float32")
    if base and is_gpu:
        advice.append(f"runtime.base=cpu (saves {base / GB:.2g} GB)")
    if is_training:
        advice.append("a lower editor.network.rank")
    build = "a lower stats.batch_tokens, or `editkit stats build` on a larger machine first"
    savings = {"measuring": "a lower evaluation.tokens_per_batch", "statistics": build}
    largest = max(counted.phases, key=lambda name: counted.phases[name])
    if (saving := (savings | dict(counted.savings)).get(largest)) is not None:
        advice.append(saving)
    if is_gpu and demand.editor.spans_devices:
        advice.append("model.device_map=auto over several GPUs")
    return advice


def _host_advice(on_host: Parts) -> list[str]:
    advice = []
    if on_host.statistics:
        advice.append(f"runtime.statistics=disk (saves {on_host.statistics / GB:.2g} GB)")
    if on_host.masters:
        advice.append(f"runtime.base=device (saves {on_host.masters / GB:.2g} GB)")
    return advice


def available() -> float | None:
    """Bytes of the host that are still free; None if the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None
    )


def free_bytes(demand: Demand) -> float | None:
    """The free bytes of the GPU that is asked for, or of all GPUs with model.device_map; None for
    another device, and for a GPU that is not here.
    """
    device = demand.runtime.device
    if not demand.runtime.is_gpu or not torch.cuda.is_available():
        return None
    count, number = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    chosen = range(count) if demand.model.device_map else [number]
    if number >= count:
        return None
    return float(sum(torch.cuda.mem_get_info(index)[0] for index in chosen))


def here(
    demand: Demand,
    *,
    facts: Mapping[str, Any] | None = None,
    training: Trained | None = None,
    free_bytes: float | None = None,
) -> Estimate | None:
    """The estimate, compared with this machine if the device is on it.

    A GPU that is not here, as on a login node, is compared with runtime.memory_gb alone; this
    machine's host is then not the run's.

    Args:
        free_bytes: the free memory of the GPU, which says that it is here.
    """
    estimate = estimated(demand, facts=facts, training=training)
    if estimate is None or free_bytes is None:
        return estimate
    return replace(
        estimate,
        limit=free_bytes if estimate.limit is None else estimate.limit,
        host_limit=available() if estimate.on_host.total else None,
    )


def require_fit(
    demand: Demand,
    *,
    facts: Mapping[str, Any] | None = None,
    training: Trained | None = None,
    free_bytes: float | None = None,
) -> Estimate | None:
    """The estimate of a run that is about to load its model, as `here`.

    Raises:
        ConfigError: it does not fit; the message says what to do.
    """
    estimate = here(demand, facts=facts, training=training, free_bytes=free_bytes)
    if estimate is not None and (problems := estimate.problems()):
        raise ConfigError(problems)
    return estimate
