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
    final_norm: str
    mlp_in_block: str = "mlp"
    # from the MLP's inner width back to the residual stream
    down_projection_in_block: str = "mlp.down_proj"
    # whether the MLP's output is added to the residual stream unchanged, without a norm in between
    adds_mlp_output: bool = True
    # all matrices of the MLP, from input to output
    mlp_matrices_in_block: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

    def block(self, layer: int) -> str:
        return f"{self.blocks}.{layer}"

    def mlp(self, layer: int) -> str:
        return f"{self.blocks}.{layer}.{self.mlp_in_block}"

    def down_projection(self, layer: int) -> str:
        return f"{self.blocks}.{layer}.{self.down_projection_in_block}"

    def mlp_matrices(self, layer: int) -> tuple[str, ...]:
        return tuple(f"{self.blocks}.{layer}.{name}" for name in self.mlp_matrices_in_block)


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
    return {
        "gpt2": Family(
            base="transformer",
            blocks="transformer.h",
            final_norm="transformer.ln_f",
            down_projection_in_block="mlp.c_proj",
            mlp_matrices_in_block=("mlp.c_fc", "mlp.c_proj"),
        ),
        "gptj": Family(
            base="transformer",
            blocks="transformer.h",
            final_norm="transformer.ln_f",
            down_projection_in_block="mlp.fc_out",
            mlp_matrices_in_block=("mlp.fc_in", "mlp.fc_out"),
        ),
        "gpt_neox": Family(
            base="gpt_neox",
            blocks="gpt_neox.layers",
            final_norm="gpt_neox.final_layer_norm",
            down_projection_in_block="mlp.dense_4h_to_h",
            mlp_matrices_in_block=("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ),
        "llama": llama,
        "mistral": llama,
        "qwen2": llama,
        "qwen3": llama,
        "gemma": llama,
        "gemma2": replace(llama, adds_mlp_output=False),
        "gemma3_text": replace(llama, adds_mlp_output=False),
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
        if name not in names
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
