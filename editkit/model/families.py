"""The module names of each known architecture, as in transformers 5."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from editkit.errors import ConfigError, message
from editkit.lazy import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The module names of an architecture. Its methods take a layer as an int and return dotted
    names.
    """

    base: str  # the network without its head, with the final norm
    blocks: str  # the list of transformer blocks
    final_norm: str | None  # None: the last block's output goes to the head
    mlp_in_block: str = "mlp"
    # from the MLP's inner width back to the residual stream
    down_projection_in_block: str = "mlp.down_proj"
    # the attention's output projection; only editors that search for a target there need it
    attention_in_block: str = "self_attn.o_proj"
    # whether the MLP's output is added to the residual stream unchanged, without a norm in between
    adds_mlp_output: bool = True
    # whether positions are those of `position_ids`; with ALiBi a token's column counts instead
    follows_position_ids: bool = True
    # all matrices of the MLP, from input to output
    mlp_matrices_in_block: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    # of a mixture: the module that holds its experts, and the one that is edited
    experts_in_block: str | None = None
    expert: int | None = None

    def block(self, layer: int) -> str:
        return f"{self.blocks}.{layer}"

    def mlp(self, layer: int) -> str:
        return f"{self.blocks}.{layer}.{self.mlp_in_block}"

    def down_projection(self, layer: int) -> str:
        return f"{self.blocks}.{layer}.{self.down_projection_in_block}"

    def attention(self, layer: int) -> str:
        return f"{self.blocks}.{layer}.{self.attention_in_block}"

    def mlp_matrices(self, layer: int) -> tuple[str, ...]:
        return tuple(f"{self.blocks}.{layer}.{name}" for name in self.mlp_matrices_in_block)

    def experts(self, layer: int) -> str:
        return f"{self.blocks}.{layer}.{self.experts_in_block}"

    def of_expert(self, expert: int) -> Family:
        """The names of one expert's matrices, which `editkit.model.experts` adds to a network. The
        router multiplies the expert's output.
        """
        within = f"{self.experts_in_block}.{expert}"
        return replace(
            self,
            expert=expert,
            mlp_in_block=f"{within}.down_proj",
            down_projection_in_block=f"{within}.down_proj",
            adds_mlp_output=False,
            mlp_matrices_in_block=(f"{within}.gate_up_proj", f"{within}.down_proj"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """The names of a model before it is loaded: the part of `EditableModel` from which an editor
    chooses its matrices.
    """

    name: str
    family: Family
    num_layers: int

    def down_projections(self, layers: Sequence[int]) -> tuple[str, ...]:
        """See `EditableModel.down_projections`."""
        require_layers(layers, name=self.name, num_layers=self.num_layers)
        return tuple(self.family.down_projection(layer) for layer in layers)

    def mlp_matrices(self, layers: Sequence[int]) -> tuple[str, ...]:
        """See `EditableModel.mlp_matrices`."""
        require_layers(layers, name=self.name, num_layers=self.num_layers)
        return tuple(name for layer in layers for name in self.family.mlp_matrices(layer))


def require_layers(layers: Sequence[int], *, name: str, num_layers: int) -> None:
    """Raises ConfigError for layers that the model does not have."""
    if wrong := [layer for layer in layers if not 0 <= layer < num_layers]:
        raise ConfigError(
            message(
                "editor.layers",
                f"{name} does not have these layers",
                got=wrong,
                expected=f"layers 0 to {num_layers - 1}",
            )
        )


def known_families() -> dict[str, Family]:
    """The families by `config.model_type`."""
    llama = Family(base="model", blocks="model.layers", final_norm="model.norm")
    gpt2 = Family(
        base="transformer",
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        down_projection_in_block="mlp.c_proj",
        attention_in_block="attn.c_proj",
        mlp_matrices_in_block=("mlp.c_fc", "mlp.c_proj"),
    )
    gptj = replace(
        gpt2,
        down_projection_in_block="mlp.fc_out",
        attention_in_block="attn.out_proj",
        mlp_matrices_in_block=("mlp.fc_in", "mlp.fc_out"),
    )
    gpt_neox = Family(
        base="gpt_neox",
        blocks="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        down_projection_in_block="mlp.dense_4h_to_h",
        attention_in_block="attention.dense",
        mlp_matrices_in_block=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    )
    # One matrix holds the gate and the other matrix into the inner width.
    fused = replace(llama, mlp_matrices_in_block=("mlp.gate_up_proj", "mlp.down_proj"))
    # A norm, or Granite's residual multiplier, stands between the MLP and the residual stream.
    changed = replace(llama, adds_mlp_output=False)
    falcon = replace(
        gpt_neox,
        base="transformer",
        blocks="transformer.h",
        final_norm="transformer.ln_f",
        attention_in_block="self_attention.dense",
    )
    return {
        # The whole MLP adds the residual stream itself.
        "bloom": replace(falcon, mlp_in_block="mlp.dense_4h_to_h", follows_position_ids=False),
        "codegen": gptj,
        "cohere": llama,
        "cohere2": llama,
        "exaone4": changed,
        "falcon": falcon,
        "gemma": llama,
        "gemma2": changed,
        "gemma3_text": changed,
        "glm": fused,
        "glm4": replace(fused, adds_mlp_output=False),
        "gpt2": gpt2,
        "gpt_bigcode": gpt2,
        "gpt_neo": replace(gpt2, attention_in_block="attn.attention.out_proj"),
        "gpt_neox": gpt_neox,
        "gptj": gptj,
        "granite": changed,
        "llama": llama,
        "mistral": llama,
        "mpt": replace(
            llama,
            base="transformer",
            blocks="transformer.blocks",
            final_norm="transformer.norm_f",
            mlp_in_block="ffn.down_proj",  # the whole MLP adds the residual stream itself
            down_projection_in_block="ffn.down_proj",
            attention_in_block="attn.out_proj",
            follows_position_ids=False,
            mlp_matrices_in_block=("ffn.up_proj", "ffn.down_proj"),
        ),
        "olmo": llama,
        "olmo2": changed,
        "olmo3": changed,
        "opt": replace(
            llama,
            base="model.decoder",
            blocks="model.decoder.layers",
            final_norm="model.decoder.final_layer_norm",
            mlp_in_block="fc2",  # there is no module of the whole MLP
            down_projection_in_block="fc2",
            attention_in_block="self_attn.out_proj",
            mlp_matrices_in_block=("fc1", "fc2"),
        ),
        "phi": replace(
            llama,
            final_norm="model.final_layernorm",
            down_projection_in_block="mlp.fc2",
            attention_in_block="self_attn.dense",
            mlp_matrices_in_block=("mlp.fc1", "mlp.fc2"),
        ),
        "phi3": fused,
        "qwen2": llama,
        # The expert that all tokens share: its output is multiplied by a gate.
        "qwen2_moe": replace(
            changed,
            mlp_in_block="mlp.shared_expert",
            down_projection_in_block="mlp.shared_expert.down_proj",
            mlp_matrices_in_block=tuple(
                f"mlp.shared_expert.{name}" for name in ("gate_proj", "up_proj", "down_proj")
            ),
        ),
        "qwen3": llama,
        "smollm3": llama,
        "stablelm": llama,
        "starcoder2": replace(
            llama,
            down_projection_in_block="mlp.c_proj",
            mlp_matrices_in_block=("mlp.c_fc", "mlp.c_proj"),
        ),
    }


def known_mixtures() -> dict[str, Family]:
    """The mixtures of experts by `config.model_type`: families once an expert is chosen."""
    mixture = Family(
        base="model",
        blocks="model.layers",
        final_norm="model.norm",
        experts_in_block="mlp.experts",
    )
    return {
        **dict.fromkeys(
            ("gpt_oss", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"), mixture
        ),
        "granitemoe": replace(mixture, experts_in_block="block_sparse_moe.experts"),
    }


def family_of(model_type: str) -> Family:
    """The family of a `config.model_type`. Raises ConfigError for an unknown one."""
    families = known_families()
    if model_type not in families:
        raise ConfigError(
            message(
                "model.id",
                "the architecture is not known",
                got=model_type,
                expected=f"one of {', '.join(sorted(families))}",
                fix="set model.family to a known architecture with the same module names, or to "
                "the names themselves: base, blocks, final_norm, mlp_in_block, "
                "down_projection_in_block, adds_mlp_output (`editkit probe` suggests them)",
            )
        )
    return families[model_type]


def check_family(family: Family, network: torch.nn.Module) -> int:
    """The number of layers of the network.

    Raises:
        ConfigError: a name of the family is no module of the network. The message has the nearest
            names.
    """
    names = [name for name, _ in network.named_modules() if name]
    problems = [
        _missing(name, names)
        for name in (family.base, family.blocks, family.final_norm)
        if name is not None and name not in names
    ]
    if problems:
        raise ConfigError(problems)
    num_layers: int = sum(
        name.startswith(f"{family.blocks}.") and name.count(".") == family.blocks.count(".") + 1
        for name in names
    )
    for layer in range(num_layers):
        problems += [
            _missing(name, names)
            for name in (family.mlp(layer), family.down_projection(layer))
            if name not in names
        ]
    if not num_layers:
        problems = [message("model.family", "the module has no layers", got=family.blocks)]
    if problems:
        raise ConfigError(problems[:4])  # the problems of the first layer repeat in all others
    return num_layers


def not_a_matrix(name: str, module: torch.nn.Module) -> str:
    """The problem of a module without a matrix that can be edited."""
    return message(
        name,
        "the module has no matrix that can be edited",
        got=type(module).__name__,
        expected="Linear or Conv1D",
    )


def _missing(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return message(
        "model.family",
        "the network has no such module",
        got=name,
        fix=f"use one of the nearest names: {', '.join(near)}" if near else None,
    )
