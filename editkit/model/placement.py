"""The placement of a network on several devices: accelerate's device map, checked for editing.

Blocks are never split. Every block must have a device of its own, because a weight that accelerate
loads on demand cannot be edited.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.families import Family
from editkit.model.network import empty_network

# Share of a device's free memory for weights. Statistics, caches and activations need the rest.
WEIGHTS_SHARE = 0.6


def placement(
    config: Any, family: Family, dtype: str, *, max_memory: Mapping[int | str, int] | None = None
) -> dict[str, int | str]:
    """The device of each module by its dotted name, as transformers' `device_map` expects it.

    Args:
        max_memory: bytes for weights by device; a share of the free memory of each GPU if None.

    Raises:
        ConfigError: there is no GPU, or the weights do not fit on the GPUs.
    """
    from accelerate import infer_auto_device_map

    memory = dict(max_memory) if max_memory is not None else _free_memory()
    network = empty_network(config)
    blocks = network.get_submodule(family.blocks)
    block = type(next(iter(blocks.children()))).__name__
    network.tie_weights()
    devices: dict[str, int | str] = infer_auto_device_map(
        network, max_memory=memory, no_split_module_classes=[block], dtype=getattr(torch, dtype)
    )
    offloaded = sorted(
        name
        for name, device in devices.items()
        if device == "disk" or (device == "cpu" and any(key != "cpu" for key in memory))
    )
    if offloaded:
        total = sum(memory.values()) / 1e9
        raise ConfigError(
            message(
                "model.device_map",
                f"the weights do not fit into {total:.3g} GB on {len(memory)} devices; "
                f"{', '.join(offloaded[:3])} would be offloaded, and offloaded weights cannot be "
                "edited",
                fix="set model.dtype=bfloat16, or choose more GPUs or a smaller model",
            )
        )
    return devices


def _free_memory() -> dict[int | str, int]:
    if not torch.cuda.is_available():
        raise ConfigError(
            message(
                "model.device_map",
                "this machine has no GPU",
                got="auto",
                fix="set model.device_map=null, which puts the whole model on runtime.device",
            )
        )
    return {
        index: int(WEIGHTS_SHARE * torch.cuda.mem_get_info(index)[0])
        for index in range(torch.cuda.device_count())
    }
