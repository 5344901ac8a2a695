"""Texts as tensors, for a run's state, which holds tensors only."""

from __future__ import annotations

import json
from typing import Any

from editkit.lazy import torch


def to_bytes(value: Any) -> torch.Tensor:
    """Plain JSON values as uint8, (bytes,)."""
    return torch.tensor(
        list(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")),
        dtype=torch.uint8,
    )


def from_bytes(bytes_B: torch.Tensor) -> Any:
    """The inverse of `to_bytes`."""
    return json.loads(bytes(bytes_B.tolist()).decode("utf-8", "surrogatepass"))
