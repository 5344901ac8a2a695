"""Whether a run, or a training, fits into memory, said before anything is loaded:
`editkit.resources.footprint` counts, this compares and advises.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.model.architecture import (
    Architecture,
    architecture_of,
    facts_without_download,
    label_of,
)
from editkit.resources.footprint import Footprint, selected

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
    working: float = 0.0

    @property
    def total(self) -> float:
        return (
            self.program
            + self.weights
            + self.masters
            + self.statistics
            + self.hypernetwork
            + self.working
        )

    def __str__(self) -> str:
        names = ("program", "weights", "masters", "statistics", "hypernetwork", "working")
        parts = ", ".join(
            f"{name} {getattr(self, name) / GB:.2g}" for name in names if getattr(self, name)
        )
        return f"{self.total / GB:.3g} GB ({parts})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run takes at its peak."""

    device: str
    on_device: Parts
    on_host: (
        Parts  # beside it, where the device is a GPU; the weights are loaded straight onto that
    )
    disk: float  # of statistics, stored or mapped
    phases: Mapping[str, float]  # the candidates for `working`
    limit: float | None  # of the device: runtime.memory_gb, or what is free; None: not known
    advice: tuple[str, ...]
    host_limit: float | None = (
        # of the host beside a GPU: what is free; None: not known, as for a GPU of another machine
        None
    )
    host_advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return _fits(self.on_device, self.limit) and _fits(self.on_host, self.host_limit)

    def rows(self) -> list[tuple[str, str]]:
        """For a listing."""
        phases = ", ".join(f"{name} {count / GB:.2g}" for name, count in self.phases.items())
        found = [
            (
                "memory",
                f"about {self.on_device} on {self.device}{_compared(self.on_device, self.limit)}",
            )
        ]
        found.append(("  working", f"the largest of {phases} GB"))
        if self.on_host.total:
            found.append(
                ("  on the host", f"{self.on_host}{_compared(self.on_host, self.host_limit)}")
            )
        return found

    def problems(self) -> list[str]:
        """Why it cannot be run here, and what to do about it."""
        found = []
        if not _fits(self.on_device, self.limit):
            found.append(
                f"runtime.memory_gb: {self.device} has {(self.limit or 0) / GB:.3g} GB, the run would take about {self.on_device} - "
                f"{'; '.join(self.advice) or 'a smaller model'}; or runtime.memory_gb=<number> if this is known to be wrong."
            )
        if not _fits(self.on_host, self.host_limit):
            found.append(
                f"runtime.device: beside {self.device} the host has {(self.host_limit or 0) / GB:.3g} GB free, the run would keep about "
                f"{self.on_host} there - {'; '.join(self.host_advice) or 'a machine with more memory'}."
            )
        return found


def _fits(parts: Parts, limit: float | None) -> bool:
    return limit is None or parts.total <= limit


def _compared(parts: Parts, limit: float | None) -> str:
    return (
        ""
        if limit is None
        else f"; {limit / GB:.3g} GB there{'' if _fits(parts, limit) else ': DOES NOT FIT'}"
    )


def estimated(
    config: Mapping[str, Any], *, facts: Mapping[str, Any] | None = None, training: bool = False
) -> Estimate | None:
    """The estimate for a composed configuration; None where the model's sizes are not known here.

    Args:
        facts: the model's config.json; None: what is known without a download.
        training: of `editkit train`, not of a run.

    Raises:
        ConfigError: the editor's layers are not set, or the model has none of that number; an
        option of it is out of range.
    """
    architecture = architecture_without_download(config, facts)
    return (
        None
        if architecture is None
        else _estimate(Footprint(config, architecture, training=training))
    )


def edited(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The matrices that a composed configuration edits; None where the model's sizes are not known
    here. Raises as `estimated`.
    """
    architecture = architecture_without_download(config)
    return None if architecture is None else selected(config, architecture)


def architecture_without_download(
    config: Mapping[str, Any], facts: Mapping[str, Any] | None = None
) -> Architecture | None:
    """The sizes of a configuration's model; None where only the hub knows them, or they are named
    otherwise than is known here.
    """
    model = config["model"]
    facts = facts or facts_without_download(
        label_of(model.get("name"), str(model["id"])), str(model["id"])
    )
    try:
        return None if facts is None else architecture_of(facts)
    except KeyError:
        return None


def _estimate(counted: Footprint) -> Estimate:
    base, moments, phases = counted.base(), counted.moments(), counted.phases()
    history, history_working = counted.history()
    learning, waiting = counted.hypernetwork()
    keeps_moments, keeps_base, is_gpu = (
        counted.statistics_at == "device",
        counted.base_at == "device",
        counted.is_gpu,
    )
    on_device = Parts(
        program=PROGRAM["cuda" if is_gpu else "cpu"],
        weights=counted.weights(),
        masters=counted.totals() + (base if keeps_base else 0),
        statistics=(moments if keeps_moments else 0) + history,
        hypernetwork=learning + (0 if is_gpu else waiting),
        working=max(max(phases.values()), history_working),
    )
    on_host = Parts(
        program=PROGRAM["cpu"],
        masters=0 if keeps_base else base,
        statistics=moments if counted.statistics_at == "cpu" else 0,
        hypernetwork=waiting,
        working=counted.copied(),
    )
    return Estimate(
        device=str(counted.runtime["device"]),
        on_device=on_device,
        on_host=on_host if is_gpu else Parts(),
        disk=counted.stored(),
        phases=phases,
        limit=_limit(counted),
        advice=tuple(
            _advice(counted, moments if keeps_moments else 0, base if keeps_base else 0, phases)
        ),
        host_advice=tuple(_host_advice(on_host)),
    )


def _limit(counted: Footprint) -> float | None:
    if (given := counted.runtime.get("memory_gb")) is not None:
        return float(given) * GB
    return None if counted.is_gpu else available()


def _advice(
    counted: Footprint, moments: float, base: float, phases: Mapping[str, float]
) -> list[str]:
    found = []
    if counted.itemsize == 4:
        found.append(f"model.dtype=bfloat16 (saves {counted.size.num_parameters * 2 / GB:.2g} GB)")
    if moments and counted.is_gpu:
        found.append(f"runtime.statistics=cpu or disk (saves {moments / GB:.2g} GB)")
    if moments and counted.solve == 8:
        found.append("solve.dtype=float32")
    if base and counted.is_gpu:
        found.append(f"runtime.base=cpu (saves {base / GB:.2g} GB)")
    if counted.training:
        found.append("a lower editor.network.rank")
    largest = max(phases, key=lambda name: phases[name])
    smaller = {
        "target": "a lower batch_size"
        if "target" not in counted.editor
        else "a lower editor.target.tokens_at_once or batch_size",
        "measuring": "a lower evaluation.tokens_per_batch",
        "statistics": "a lower stats.batch_tokens, or `editkit stats build` on a larger machine first",
        "step": "a lower editor.train.at_once",
    }
    if largest in smaller:
        found.append(smaller[largest])
    if counted.is_gpu and (counted.maker is None or counted.maker.spans_devices):
        found.append("model.device_map=auto over several GPUs")
    return found


def _host_advice(on_host: Parts) -> list[str]:
    found = []
    if on_host.statistics:
        found.append(f"runtime.statistics=disk (saves {on_host.statistics / GB:.2g} GB)")
    if on_host.masters:
        found.append(f"runtime.base=device (saves {on_host.masters / GB:.2g} GB)")
    return found


def available() -> float | None:
    """Bytes of the host that can still be had; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(
        (float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None
    )


def free_bytes(config: Mapping[str, Any]) -> float | None:
    """Of the GPU that a configuration asks for, or of all with model.device_map; None for another
    device, and one that is not here.
    """
    device = str(config["runtime"]["device"])
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    count, number = torch.cuda.device_count(), int(device.partition(":")[2] or 0)
    wanted = range(count) if config["model"].get("device_map") else [number]
    return (
        float(sum(torch.cuda.mem_get_info(index)[0] for index in wanted))
        if number < count
        else None
    )


def here(
    config: Mapping[str, Any],
    *,
    facts: Mapping[str, Any] | None = None,
    training: bool = False,
    free_bytes: float | None = None,
) -> Estimate | None:
    """The estimate, held against this machine as far as the configuration's device is on it.

    A GPU that is not here, as on a login node, is held against runtime.memory_gb alone, and this
    machine's host is then not the run's.

    Args:
        free_bytes: what is free on the GPU, which says that it is here.
    """
    found = estimated(config, facts=facts, training=training)
    if found is None or free_bytes is None:
        return found
    return replace(
        found,
        limit=free_bytes if found.limit is None else found.limit,
        host_limit=available() if found.on_host.total else None,
    )


def require_fit(
    config: Mapping[str, Any],
    *,
    facts: Mapping[str, Any] | None = None,
    training: bool = False,
    free_bytes: float | None = None,
) -> Estimate | None:
    """The estimate of a run that is about to load its model, as `here`. Raises ConfigError, with
    what to do, where it does not fit.
    """
    found = here(config, facts=facts, training=training, free_bytes=free_bytes)
    if found is not None and (problems := found.problems()):
        raise ConfigError(problems)
    return found
