"""The memory and disk space for collecting second moments, estimated before the start."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.stats.collect import PARTS, TriangleSum, blocks_of, keys_at_once
from editkit.stats.corpus import StatsConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from editkit.model.editable import EditableModel

GB = 1e9
# Tensors of the residual width and of the MLP's inner width at the peak of a pass, measured with
# GPT-2.
PASS_BUFFERS = (8, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Bytes on the model's device; `disk_bytes` on disk, including unfinished sums."""

    num_modules: int
    size: int  # of the largest matrix
    num_documents: int
    weights_bytes: int  # already allocated
    sums_bytes: int
    keys_bytes: int
    pass_bytes: int
    disk_bytes: int
    free_bytes: int | None  # on the device; None if unknown

    @property
    def more_bytes(self) -> int:
        """The bytes in addition to the weights."""
        return self.sums_bytes + self.keys_bytes + self.pass_bytes

    def __str__(self) -> str:
        parts = {
            "weights": self.weights_bytes,
            "sums": self.sums_bytes,
            "keys": self.keys_bytes,
            "a pass": self.pass_bytes,
        }
        text = (
            f"{self.num_modules} second moments of up to {self.size} x {self.size} over "
            f"{self.num_documents} documents; memory: about "
            f"{sum(parts.values()) / GB:.2g} GB "
            f"({', '.join(f'{name} {count / GB:.2g}' for name, count in parts.items())}); "
            f"disk: up to {self.disk_bytes / GB:.2g} GB"
        )
        if self.free_bytes is not None and self.more_bytes > self.free_bytes:
            free = f"{self.free_bytes / GB:.2g} GB"
            text += (
                f". Only {free} are free in addition to the weights. Fix: lower "
                "stats.batch_tokens, or edit fewer layers"
            )
        return text


def estimate(
    model: EditableModel, modules: Sequence[str], config: StatsConfig, *, num_documents: int
) -> Estimate:
    """The estimate. Sums and keys are exact, a pass is approximate."""
    network = model.network.config.get_text_config()
    sizes = [model.weight(module).shape[1] for module in modules]
    context = min(config.context_length, model.max_length)
    sums = sum(TriangleSum.zeros(size, "meta").num_bytes for size in sizes)
    tokens, itemsize = max(config.batch_tokens, context), model.dtype.itemsize
    hidden, inner = PASS_BUFFERS
    pass_values = tokens * (hidden * network.hidden_size + inner * max(sizes))
    if network._attn_implementation == "eager":  # scores and their softmax
        pass_values += 2 * tokens * context * network.num_attention_heads
    num_parts = sum(bool(blocks_of(part, num_documents)) for part in range(PARTS))
    return Estimate(
        num_modules=len(modules),
        size=max(sizes),
        num_documents=num_documents,
        weights_bytes=sum(parameter.nbytes for parameter in model.network.parameters()),
        sums_bytes=sums,
        keys_bytes=keys_at_once(context, config.batch_tokens) * sum(sizes) * itemsize,
        pass_bytes=pass_values * itemsize,
        disk_bytes=num_parts * sums + 8 * sum(size**2 for size in sizes),
        free_bytes=free_memory(model.device),
    )


def free_memory(device: torch.device) -> int | None:
    """The free bytes of a device; None if the system does not report them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text().splitlines()
        except OSError:
            return None
        return next(
            (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")),
            None,
        )
    return None
