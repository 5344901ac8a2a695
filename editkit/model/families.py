"""Where the parts of a network are: one line of names per architecture, the names that transformers
5 gives them.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from editkit.errors import ConfigError
from editkit.lazy import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """The names of an architecture's modules. A layer is an int, everything that the methods give
    back is a dotted name.
    """

    base: str  # the network without its head, with the final norm
    blocks: str  # the list of transformer blocks
    final_norm: str
    mlp_in_block: str = "mlp"
    # from the MLP's inner width back to the residual stream
    down_projection_in_block: str = "mlp.down_proj"
    adds_mlp_output: bool = True  # to the residual stream, as it is: no norm in between
    mlp_matrices_in_block: tuple[str, ...] = (
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )  # all of them, from input to output

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
    """A model as far as its names go, before anything of it is loaded: what an editor's choice of
    matrices needs of an `EditableModel`.
    """

    name: str
    family: Family
    num_layers: int

    def down_projections(self, layers: Sequence[int]) -> tuple[str, ...]:
        """As `EditableModel.down_projections`."""
        require_layers(layers, name=self.name, num_layers=self.num_layers)
        return tuple(self.family.down_projection(layer) for layer in layers)

    def mlp_matrices(self, layers: Sequence[int]) -> tuple[str, ...]:
        """As `EditableModel.mlp_matrices`."""
        require_layers(layers, name=self.name, num_layers=self.num_layers)
        return tuple(name for layer in layers for name in self.family.mlp_matrices(layer))


def require_layers(layers: Sequence[int], *, name: str, num_layers: int) -> None:
    """Raises ConfigError for layers that the model of that name does not have."""
    if wrong := [layer for layer in layers if not 0 <= layer < num_layers]:
        raise ConfigError(
            f"editor.layers: {name} has layers 0 to {num_layers - 1} - given "
            f"{', '.join(map(str, wrong))}."
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
    """The family of a `config.model_type`. Raises ConfigError for one that is not in the table."""
    families = known_families()
    if model_type not in families:
        raise ConfigError(
            f"model.id: the architecture {model_type!r} is not known. Known: "
            f"{', '.join(sorted(families))}. "
            "Give model.family the name of one that has the same module names, or the names "
            "themselves: base, blocks, final_norm, "
            "mlp_in_block, down_projection_in_block, adds_mlp_output (`editkit probe` looks for "
            "them)."
        )
    return families[model_type]


def check_family(family: Family, network: torch.nn.Module) -> int:
    """The number of layers. Raises ConfigError where a name of the family is no module of the
    network, with the nearest names that are.
    """
    names = [name for name, _ in network.named_modules() if name]
    problems = [
        _missing(name, names)
        for name in (family.base, family.blocks, family.final_norm)
        if name not in names
    ]
    if problems:
        raise ConfigError(problems)
    num_layers = sum(
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
        problems = [f"model.family: {family.blocks!r} holds no layers."]
    if problems:
        raise ConfigError(problems[:4])  # the first layer tells as much as all of them
    result: int = num_layers
    return result


def _missing(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return (
        f"model.family: the network has no module {name!r}. Nearest: {', '.join(near) or 'none'}."
    )
