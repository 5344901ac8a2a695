"""Networks made from their configuration alone: with seeded random weights, or without weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from editkit.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def random_network(config: Any, *, device: str, dtype: str) -> PreTrainedModel:
    """A network of that configuration with seeded random weights, made where it will run; the
    global generators stay as they were.
    """
    from transformers import AutoModelForCausalLM

    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(SEED)
        result: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype)
        )
        return result


def empty_network(config: Any) -> PreTrainedModel:
    """The network without its weights, on the meta device: names and shapes."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        result: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        return result


SEED = 0  # of random weights
