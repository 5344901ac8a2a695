"""Networks built from their configuration, with seeded random weights or without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from editkit.lazy import torch
from editkit.model.kinds import auto_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEED = 0  # of random weights


def random_network(config: Any, *, device: str, dtype: str) -> PreTrainedModel:
    """A network with seeded random weights, created on its device.

    The states of the global random generators do not change.
    """
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(SEED)
        network: PreTrainedModel = auto_class(config).from_config(
            config, dtype=getattr(torch, dtype)
        )
        return network


def empty_network(config: Any) -> PreTrainedModel:
    """The network on the meta device, with module names and shapes but without weights."""
    with torch.device("meta"):
        network: PreTrainedModel = auto_class(config).from_config(config)
        return network
