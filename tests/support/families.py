"""Tiny models of every family with random weights: what a family's name stands for is in
`editkit.model.families`.
"""

from __future__ import annotations

from typing import Any

import torch

from editkit.model.editable import EditableModel
from editkit.model.families import Family
from editkit.model.load import ModelConfig
from tests.support.helpers import tiny_tokenizer

WIDTH, INNER, POSITIONS = 32, 48, 128
LLAMA = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": INNER,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.15,
}
GPT = {
    "n_embd": WIDTH,
    "n_head": 4,
    "n_inner": INNER,
    "n_positions": POSITIONS,
    "rotary_dim": 4,
    "initializer_range": 0.15,
}
# By family, the keys of its config.json besides those of LLAMA (or instead of them).
CONFIGS: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": WIDTH, "n_head": 4, "initializer_range": 0.15},
    "codegen": GPT,
    "cohere": LLAMA | {"logit_scale": 0.25, "use_qk_norm": True},
    "cohere2": LLAMA | {"logit_scale": 0.25, "sliding_window": 64},
    "exaone4": LLAMA | {"sliding_window": 64, "sliding_window_pattern": 2},
    "falcon": {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "ffn_hidden_size": INNER,
        "alibi": False,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.15,
    },
    "gemma": LLAMA,
    "gemma2": LLAMA | {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": LLAMA | {"query_pre_attn_scalar": 8},
    "glm": LLAMA,
    "glm4": LLAMA,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_neo": {
        "hidden_size": WIDTH,
        "num_heads": 4,
        "intermediate_size": INNER,
        "max_position_embeddings": POSITIONS,
        "window_size": 64,
        "initializer_range": 0.15,
    },
    "gpt_neox": LLAMA,
    "gptj": GPT,
    "granite": LLAMA
    | {
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
    },
    "llama": LLAMA,
    "mistral": LLAMA | {"sliding_window": None},
    "mpt": {
        "d_model": WIDTH,
        "n_heads": 4,
        "expansion_ratio": 2,
        "max_seq_len": POSITIONS,
        "initializer_range": 0.15,
    },
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "olmo3": LLAMA | {"sliding_window": 64},
    "opt": {
        "hidden_size": WIDTH,
        "num_attention_heads": 4,
        "ffn_dim": INNER,
        "word_embed_proj_dim": WIDTH,
        "max_position_embeddings": POSITIONS,
        "init_std": 0.15,
    },
    "phi": LLAMA | {"partial_rotary_factor": 0.5, "num_key_value_heads": 4},
    "phi3": LLAMA,
    "qwen2": LLAMA,
    "qwen2_moe": LLAMA
    | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": INNER,
        "shared_expert_intermediate_size": INNER,
    },
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": LLAMA,
}
MOE = LLAMA | {"num_experts_per_tok": 2}
# Likewise of mixtures of experts, of which one is edited.
MIXTURES: dict[str, dict[str, Any]] = {
    "gpt_oss": MOE
    | {
        "num_local_experts": 4,
        "sliding_window": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "granitemoe": MOE | {"num_local_experts": 4, "residual_multiplier": 0.5},
    "mixtral": MOE | {"num_local_experts": 4},
    "olmoe": MOE | {"num_experts": 4},
    "phimoe": MOE | {"num_local_experts": 4},
    "qwen2_moe": CONFIGS["qwen2_moe"],
    "qwen3_moe": MOE | {"num_experts": 4, "moe_intermediate_size": INNER},
}
DEPTH_KEYS = {"gpt2", "gptj", "gpt_bigcode", "codegen", "bloom", "mpt"}  # that say n_layer(s)


def family_config(kind: str, *, num_layers: int = 4, **changes: Any) -> Any:
    """The transformers configuration of a tiny network of this family."""
    from transformers import AutoConfig

    depth = {"mpt": "n_layers"}.get(kind, "n_layer" if kind in DEPTH_KEYS else "num_hidden_layers")
    depths: dict[str, Any] = {depth: num_layers}
    if kind == "gpt_neo":
        depths = {
            "num_layers": num_layers,
            "attention_types": [[["global", "local"], num_layers // 2]],
        }
    tokenizer = tiny_tokenizer("llama")
    common = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "tie_word_embeddings": True,
    }
    return AutoConfig.for_model(kind, **common | (CONFIGS | MIXTURES)[kind] | depths | changes)


def family_model(
    kind: str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    family: Family | str | None = None,
    expert: int | None = None,
    num_layers: int = 4,
    tokenizer: Any = None,
    **changes: Any,
) -> EditableModel:
    """A tiny model of this family. Norms and biases are random too, because the identity would hide
    that one of them was left out.

    The default of `tokenizer` is `tiny_tokenizer("llama")`.
    """
    from transformers import AutoModelForCausalLM

    if tokenizer is not None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        changes |= {name: getattr(tokenizer, name) for name in names}
        changes["vocab_size"] = len(tokenizer)
    config = family_config(kind, num_layers=num_layers, **changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    settings = ModelConfig(id=kind, family=family, expert=expert)
    return EditableModel(
        network.to(getattr(torch, dtype)),
        tiny_tokenizer("llama") if tokenizer is None else tokenizer,
        name=f"tiny-{kind}",
        family=settings.family_of(network.config),
    )
