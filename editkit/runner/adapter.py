"""The edits of a run as low-rank factors of each matrix: a LoRA adapter for peft, or the factors
themselves. The edits are the totals of the matrices, or LoRA's products beside them.

peft computes W x + (alpha / r) B A x with A (r, I) and B (O, r). Here alpha = r, and B A is the
total D = W_N - W_0. All matrices of an adapter have one rank; smaller factors get zeros.

Shape letters: O d_out, I d_in, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from editkit.editors.low_rank_side import LowRankSide
from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.linalg.total import Total

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.model.side_value import AbstractBeside

# Values of vLLM's --max-lora-rank (vllm.config.lora.MaxLoRARanks of version 0.14). An adapter's
# rank is padded to the next one, so that it can be named there.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
LORA_CONFIG, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names
DELTA = "editkit_delta.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """The factors of each edited matrix in float32, largest singular values first."""

    base: str  # the id of the base model
    factors: Mapping[str, LowRank]  # by module
    errors: dict[str, float]  # by module: |D - its factors| / |D| in the Frobenius norm
    is_transposed: bool  # whether the modules store (I, O), as GPT-2's Conv1D

    @property
    def rank(self) -> int:
        """The rank of a LoRA adapter: the largest of its matrices, padded to one that is served."""
        largest = max(factor.rank for factor in self.factors.values())
        return next((rank for rank in SERVED_RANKS if rank >= largest), largest)


def products(sides: Sequence[AbstractBeside]) -> dict[str, Total]:
    """What adapters beside the weights add to each matrix; empty if something else stands there."""
    if not all(isinstance(side, LowRankSide) for side in sides):
        return {}
    added = {side.module: side.product() for side in sides if isinstance(side, LowRankSide)}
    return {module: Total(product.shape).plus(product) for module, product in added.items()}


def adapter_of(model: EditableModel, totals: Mapping[str, Total], *, rank: int | None) -> Adapter:
    """The factors of these totals.

    Args:
        rank: the largest rank, by a truncated SVD. None: that of each total, to rounding.

    Raises:
        ConfigError: the run wrote no matrix; a matrix is no module of its own (an expert of a
            mixture); a total is not finite; the rank is larger than a matrix has.
    """
    from transformers.pytorch_utils import Conv1D

    if not totals:
        fix = "export it without --as: what stands beside the weights is in that folder"
        raise ConfigError(message("--as", "the run changed no matrix", fix=fix))
    modules = dict(model.network.named_modules())
    problems = []
    for name, total in totals.items():
        if not isinstance(modules.get(name), torch.nn.Linear | Conv1D):
            expected = "matrices that are linear layers of their own"
            problems.append(message("--as", "cannot be written", got=name, expected=expected))
        elif not total.is_finite():
            problems.append(message("--as", "the total is not finite", got=name))
        elif rank is not None and rank > min(total.shape):
            expected = f"at most {min(total.shape)}, the rank that {name} can have"
            problems.append(
                message("--rank", "larger than the matrix", got=rank, expected=expected)
            )
    if problems:
        raise ConfigError(problems)
    factors, errors = {}, {}
    for name, total in totals.items():
        factors[name], errors[name] = _factors(total, rank)
    return Adapter(
        base=model.network.config.name_or_path or model.name,
        factors=factors,
        errors=errors,
        is_transposed=isinstance(modules[next(iter(totals))], Conv1D),
    )


def _factors(total: Total, rank: int | None) -> tuple[LowRank, float]:
    """D as U S V^T without the singular values that are zero to rounding, and at most `rank` of
    them; and its relative error.
    """
    u_OK, s_K, v_IK = total.svd()
    largest = float(s_K[0]) if len(s_K) else 0.0
    kept = int((s_K > largest * torch.finfo(torch.float32).eps).sum())
    kept = max(1, kept if rank is None else min(kept, rank))  # peft has no rank 0
    roots_R = s_K[:kept].sqrt()
    norm = float(torch.linalg.vector_norm(s_K))
    error = float(torch.linalg.vector_norm(s_K[kept:])) / norm if norm else 0.0
    return LowRank((u_OK[:, :kept] * roots_R).float(), (v_IK[:, :kept] * roots_R).float()), error


def write_adapter(
    adapter: Adapter,
    folder: Path,
    *,
    form: Literal["lora", "delta"] | str,
) -> None:
    """Writes the files of an adapter."""
    from safetensors.torch import save_file

    if form == "lora":
        tensors = {}
        for name, factor in adapter.factors.items():
            pad = (0, adapter.rank - factor.rank)
            left_OR = torch.nn.functional.pad(factor.left_OR, pad)
            right_IR = torch.nn.functional.pad(factor.right_IR, pad)
            key = f"base_model.model.{name}"
            tensors[f"{key}.lora_A.weight"] = right_IR.T.contiguous()
            tensors[f"{key}.lora_B.weight"] = left_OR.contiguous()
        save_file(tensors, folder / LORA_WEIGHTS, metadata={"format": "pt"})
        (folder / LORA_CONFIG).write_text(json.dumps(_peft_config(adapter), indent=1))
    else:
        tensors = {}
        for name, factor in adapter.factors.items():
            tensors[f"{name}.left"] = factor.left_OR.contiguous()
            tensors[f"{name}.right"] = factor.right_IR.contiguous()
        facts = {"base": adapter.base, "update": "left @ right.T, (d_out, d_in)"}
        save_file(tensors, folder / DELTA, metadata=facts)


def _peft_config(adapter: Adapter) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(adapter.factors),
        "fan_in_fan_out": adapter.is_transposed,
    }
