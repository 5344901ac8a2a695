"""A digest of a loaded, unedited model: what statistics and checkpoints are keyed by.

Two models with the same fingerprint have the same architecture, tokenizer and weights, wherever
they were loaded from.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from editkit.lazy import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

SAMPLE = 2**20  # values a tensor
SUMMED_AT_ONCE = (
    2**24
)  # values: a sum in another dtype copies what it adds, four times a bfloat16 embedding
NOT_CONTENT = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
}  # keys of a config


def fingerprint(network: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> str:
    """32 hex digits over config, tokenizer and weights.

    Every tensor enters with its name, shape, dtype, the bytes of an evenly strided sample of at
    most 2^20 values (tensors up to that size are read whole) and the sum of all its values taken as
    integers. That sum is exact in any order, so device and thread count do not matter, and it
    notices one changed value outside the sample; what stays unseen is a permutation outside the
    sample.
    """
    total = hashlib.sha256(_config_json(network.config).encode())  # type: ignore[arg-type]
    total.update(_tokenizer_json(tokenizer).encode())
    for name, tensor in sorted(network.state_dict().items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        bits = tensor.detach().contiguous().view(-1).view(_integer_of_size(tensor.element_size()))
        total.update(_sum(bits).to_bytes(8, signed=True))
        stride = -(-bits.numel() // SAMPLE) or 1
        total.update(bits[::stride].contiguous().cpu().numpy().tobytes())
    return total.hexdigest()[:32]


def _sum(bits: torch.Tensor) -> int:
    """Modulo 2^64, as a signed number: the same however it is cut."""
    parts = [part.sum(dtype=torch.int64) for part in bits.split(SUMMED_AT_ONCE)]
    return int(torch.stack(parts).sum()) if parts else 0


def _config_json(config: PretrainedConfig) -> str:
    content = {key: value for key, value in config.to_diff_dict().items() if key not in NOT_CONTENT}
    return json.dumps(content, sort_keys=True, default=str)


def _tokenizer_json(tokenizer: Any) -> str:
    """Truncation and padding are left out: they are settings of the last call."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps(content | {"truncation": None, "padding": None}, sort_keys=True)


def _integer_of_size(num_bytes: int) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[num_bytes]
