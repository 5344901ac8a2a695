"""Which part of a network lies on which device, where one device is too small: accelerate's plan,
checked for what editing needs.

Blocks stay whole, and every block must lie on a device with memory of its own: a weight that
accelerate fetches when it is needed cannot be edited.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.model.families import Family
from editkit.model.network import empty_network

# of a device's free memory is for weights; statistics, caches and activations want the rest
HEADROOM = 0.6


def placement(
    config: Any, family: Family, dtype: str, *, max_memory: Mapping[int | str, int] | None = None
) -> dict[str, int | str]:
    """The device of each part, by its dotted name, as transformers' `device_map` takes it.

    Args:
        max_memory: bytes for weights by device; None: a share of what is free on each GPU.

    Raises:
        ConfigError: there is no GPU, or the weights do not fit on those there are.
    """
    from accelerate import infer_auto_device_map

    memory = dict(max_memory) if max_memory is not None else _free_memory()
    network = empty_network(config)
    blocks = network.get_submodule(family.blocks)
    block = type(next(iter(blocks.children()))).__name__
    network.tie_weights()
    found = infer_auto_device_map(
        network, max_memory=memory, no_split_module_classes=[block], dtype=getattr(torch, dtype)
    )
    away = sorted(
        name
        for name, device in found.items()
        if device == "disk" or (device == "cpu" and any(key != "cpu" for key in memory))
    )
    if away:
        total = sum(memory.values()) / 1e9
        raise ConfigError(
            f"model.device_map: the weights do not fit - {total:.3g} GB are free for them on "
            f"{len(memory)} devices, and "
            f"{', '.join(away[:3])} would be left over - choose model.dtype=bfloat16, more GPUs "
            "or a smaller model: weights fetched "
            "when they are needed cannot be edited."
        )
    result: dict[str, int | str] = found
    return result


def _free_memory() -> dict[int | str, int]:
    if not torch.cuda.is_available():
        raise ConfigError(
            "model.device_map: auto was given, but there is no GPU here - null puts the whole "
            "model on runtime.device."
        )
    return {
        index: int(HEADROOM * torch.cuda.mem_get_info(index)[0])
        for index in range(torch.cuda.device_count())
    }
