"""The sizes of networks, from their config.json. The named models need neither a download nor
torch.

`architectures.json` holds the sizes, heads and vocabulary of the models that `conf/model` names,
with the keys of their own config.json. Defaults of transformers may be missing there. Random
weights, benchmarks and the memory estimate read this file.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError
from editkit.model.gguf import read_header
from editkit.model.source import ASSET, GGUF, PACKAGE, find_source

NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
NAMES = {  # the keys of a size in config.json
    "width": ("hidden_size", "n_embd", "d_model"),
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "num_positions": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "num_experts": NUM_EXPERTS,
}
# Where config.json does not say, as with Bloom, which has no positions and was trained on as many.
NUM_POSITIONS = 2048
# Families whose head is tied to the embedding unless their config.json says otherwise.
TIED = {
    *("bloom", "cohere", "cohere2", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2"),
    *("gpt_bigcode", "gpt_neo", "mpt", "opt", "smollm3", "starcoder2"),
}
# Families with eager attention only: transformers implements no other for them, for Gemma 2 because
# of its soft cap and for gpt-oss because of its sinks.
EAGER = {"bloom", "codegen", "gemma2", "gpt_neo", "gpt_oss", "gptj", "mpt"}
# Families whose MLP has one matrix into its inner width.
NOT_GATED = {
    *("bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt"),
    *("opt", "phi", "starcoder2"),
}


def label_of(name: str | None, model_id: str) -> str:
    """The model's name in results: `name`, or the last part of the id."""
    bare = model_id.removeprefix(ASSET).removeprefix(PACKAGE).rstrip("/")
    return name or bare.rsplit("/", 1)[-1].removesuffix(GGUF)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A network's sizes."""

    facts: Mapping[str, Any]  # the content of config.json
    kind: str  # config.model_type
    width: int
    inner: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_width: int
    vocabulary: int
    num_positions: int
    is_tied: bool
    num_experts: int = 1  # of a mixture, each with matrices of its own

    @property
    def num_parameters(self) -> int:
        """The number of parameters, exact for the families of the named models. Other families are
        counted as a Llama with or without gates, which is right to a few percent.
        """
        width, inner, layers, vocabulary = self.width, self.inner, self.num_layers, self.vocabulary
        if self.kind in ("gpt2", "gptj", "gpt_neox"):
            attention = 4 * width * width + (0 if self.kind == "gptj" else 4 * width)
            norms = 2 * width if self.kind == "gptj" else 4 * width
            block = attention + norms + 2 * width * inner + inner + width
            embeddings = vocabulary * width + (
                self.num_positions * width if self.kind == "gpt2" else 0
            )
            head = (0 if self.is_tied else vocabulary * width) + (
                vocabulary if self.kind == "gptj" else 0
            )
            return embeddings + layers * block + 2 * width + head
        queries, keys = self.num_heads * self.head_width, self.num_key_value_heads * self.head_width
        attention = 2 * width * queries + 2 * width * keys
        if self.kind == "qwen2" or self.facts.get("attention_bias"):
            attention += queries + 2 * keys + (0 if self.kind == "qwen2" else width)
        norms = (4 if self.kind in ("gemma2", "gemma3_text") else 2) * width
        norms += 2 * self.head_width if self.kind in ("qwen3", "gemma3_text") else 0
        biases = 2 * inner + width if self.facts.get("mlp_bias") else 0
        head = 0 if self.is_tied else vocabulary * width
        mlp = (3 if self.is_gated else 2) * width * inner
        if self.num_experts > 1:
            shared = int(self.facts.get("shared_expert_intermediate_size") or 0)
            mlp = self.num_experts * (mlp + width) + 3 * width * shared
        return vocabulary * width + layers * (attention + norms + mlp + biases) + width + head

    @property
    def block_parameters(self) -> int:
        """The number of parameters of a block, as `num_parameters` counts them."""
        return self.num_parameters - self.of_depth(self.num_layers - 1).num_parameters

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate matrix, that is two matrices into its inner width."""
        return self.kind not in NOT_GATED

    def of_depth(self, num_layers: int) -> Architecture:
        """The same architecture with another number of layers."""
        key = next(key for key in NAMES["num_layers"] if key in self.facts)
        return replace(self, facts={**self.facts, key: num_layers}, num_layers=num_layers)


def architecture_of(facts: Mapping[str, Any]) -> Architecture:
    """The architecture described by a config.json.

    Raises:
        KeyError: a size is missing or has an unknown key.
    """

    def size(name: str) -> int | None:
        return next((int(facts[key]) for key in NAMES[name] if facts.get(key) is not None), None)

    width, heads = size("width"), size("num_heads")
    if width is None or heads is None:
        raise KeyError("hidden_size, num_attention_heads")
    kind = str(facts["model_type"])
    layers, positions = size("num_layers"), size("num_positions")
    if layers is None:
        raise KeyError("num_hidden_layers")
    return Architecture(
        facts=facts,
        kind=kind,
        width=width,
        inner=int(facts.get("moe_intermediate_size") or size("inner") or 4 * width),
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=int(facts.get("num_key_value_heads") or heads),
        head_width=int(facts.get("head_dim") or width // heads),
        vocabulary=int(facts["vocab_size"]),
        num_positions=positions or NUM_POSITIONS,
        is_tied=bool(facts.get("tie_word_embeddings", kind in TIED)),
        num_experts=size("num_experts") or 1,
    )


def context_length(config: Any) -> int:
    """The number of positions of a transformers configuration."""
    values = (getattr(config, key, None) for key in NAMES["num_positions"])
    return next((int(value) for value in values if value is not None), NUM_POSITIONS)


def sliding_window(config: Any) -> int | None:
    """The tokens that a layer with a window attends to; None without such layers."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    if window is None and "local" in (getattr(config, "attention_layers", None) or ()):
        window = config.window_size  # GPT-Neo
    return window or None


def known_facts() -> dict[str, dict[str, Any]]:
    """The known parts of config.json by model name, newly read at each call."""
    text = (importlib.resources.files("editkit") / "model" / "architectures.json").read_text()
    facts: dict[str, dict[str, Any]] = json.loads(text)
    return facts


def facts_without_download(name: str, id: str) -> dict[str, Any] | None:
    """The config.json of a bundled model or a folder, the sizes in the header of a GGUF file, or
    the known parts of a named model's; None if only the hub has it.
    """
    try:
        source = find_source(id)
        path = Path(source.place) / "config.json"
        if source.gguf is not None:
            return read_header(source.gguf).facts()
        if path.is_file():
            facts: dict[str, Any] = json.loads(path.read_text())
            return facts
    except ConfigError:  # loading the model reports it, with a fix
        pass
    except (ValueError, RecursionError):  # a damaged config.json, likewise
        return None
    return known_facts().get(name)
