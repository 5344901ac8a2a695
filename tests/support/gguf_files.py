"""Tiny GGUF files, written with the gguf package from networks with random weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from tests.support.helpers import tiny_tokenizer

GgufKind = Literal["llama", "gpt2"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def require_gguf() -> Any:
    """The gguf package. Skips the test, with the reason, where it is missing."""
    return pytest.importorskip("gguf", reason="the gguf package is not installed")


def tiny_network(kind: GgufKind, *, tied: bool = True) -> Any:
    """A network of width 32 with the vocabulary of the byte-level tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = tiny_tokenizer("gpt2")
    sizes: dict[GgufKind, dict[str, Any]] = {
        "llama": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "max_position_embeddings": 1024,
        },
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    }
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        tie_word_embeddings=tied,
        initializer_range=0.15,
        **sizes[kind],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def write_gguf(  # the parts of a file that tests vary
    path: Path,
    network: Any,
    *,
    architecture: str | None = None,
    quantisation: str = "F32",
    with_tokenizer: bool = True,
    chat_template: str | None = TEMPLATE,
    further: dict[str, Any] | None = None,
) -> Path:
    """Writes the network as llama.cpp's converter does. Matrices are quantised, vectors are not."""
    gguf = require_gguf()
    config = network.config
    kind = gguf.MODEL_ARCH.LLAMA if config.model_type == "llama" else gguf.MODEL_ARCH.GPT2
    writer = gguf.GGUFWriter(path, architecture or config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    if config.model_type == "llama":
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(10000.0)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    for key, value in (further or {}).items():
        writer.add_string(key, value)
    if with_tokenizer:
        _add_tokenizer(writer, chat_template)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in network.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, _, suffix = name.rpartition(".")
        values = _as_stored(stem, suffix, tensor, config).numpy()
        type_ = gguf.GGMLQuantizationType[quantisation if values.ndim == 2 else "F32"]
        writer.add_tensor(
            f"{names.get_name(stem)}.{suffix}", gguf.quantize(values, type_), raw_dtype=type_
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_stored(stem: str, suffix: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    """A tensor in llama.cpp's layout: (d_out, d_in), and for Llama the two halves of each head's
    rotary dimensions interleaved.
    """
    tensor = tensor.detach().float()
    if config.model_type == "gpt2":
        is_conv = suffix == "weight" and stem.endswith(("c_attn", "c_proj", "c_fc"))
        return tensor.T.contiguous() if is_conv else tensor
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if (count := heads.get(stem.rpartition(".")[2])) is None:
        return tensor
    halves = tensor.reshape(count, 2, -1, tensor.shape[1])
    return halves.transpose(1, 2).reshape(tensor.shape)


def _add_tokenizer(writer: Any, chat_template: str | None) -> None:
    content = json.loads(tiny_tokenizer("gpt2").backend_tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token == "<|endoftext|>" else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in content["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def dequantised(matrix: torch.Tensor, quantisation: str) -> torch.Tensor:
    """What is left of a matrix after quantisation, computed by the gguf package."""
    gguf = require_gguf()
    type_ = gguf.GGMLQuantizationType[quantisation]
    values = gguf.quantize(matrix.detach().float().numpy(), type_)
    return torch.from_numpy(np.array(gguf.dequantize(values, type_)))


def install_package(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package whose import would fail. Returns its folder."""
    package = folder / "site" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('this package must not be imported')\n")
    monkeypatch.syspath_prepend(str(folder / "site"))
    sys.modules.pop(name, None)
    return package
