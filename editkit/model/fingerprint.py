"""A digest of a loaded, unedited model, which identifies the model of statistics and checkpoints.

Two models with the same fingerprint have the same architecture, tokenizer and weights, independent
of their origin.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from editkit.lazy import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

SAMPLE = 2**20  # sampled values per tensor
# Values per partial sum. A sum in another dtype copies its input, which takes four times the memory
# of a bfloat16 tensor.
SUMMED_AT_ONCE = 2**24
NOT_CONTENT = {  # keys of config.json that do not describe the network
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
}


def fingerprint(network: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> str:
    """32 hex digits that identify config, tokenizer and weights.

    Every tensor contributes its name, shape, dtype, the bytes of an evenly strided sample of at
    most 2^20 values, and the sum of all its values read as integers. Tensors up to the sample size
    are read whole. The integer sum is exact in any order, so device and thread count do not matter.
    It detects one changed value outside the sample, but not a permutation outside the sample.
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
    """The sum modulo 2^64 as a signed number. It does not depend on the partial sums."""
    parts = [part.sum(dtype=torch.int64) for part in bits.split(SUMMED_AT_ONCE)]
    return int(torch.stack(parts).sum()) if parts else 0


def _config_json(config: PretrainedConfig) -> str:
    content = {key: value for key, value in config.to_diff_dict().items() if key not in NOT_CONTENT}
    return json.dumps(content, sort_keys=True, default=str)


def _tokenizer_json(tokenizer: Any) -> str:
    """The tokenizer as JSON without truncation and padding, which only reflect its last call."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    return json.dumps(content | {"truncation": None, "padding": None}, sort_keys=True)


def _integer_of_size(num_bytes: int) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[num_bytes]
