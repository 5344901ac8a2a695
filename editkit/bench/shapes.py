"""Shapes of models for networks with random weights, and the layers that are edited in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from editkit.errors import ConfigError, message
from editkit.model.architecture import (
    Architecture,
    architecture_of,
    facts_without_download,
    known_facts,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a network and the layers that published configurations edit."""

    facts: Mapping[str, Any]  # the sizes in the model's config.json
    rome_layer: int
    memit_layers: tuple[int, ...]  # five if the depth allows it

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.facts)

    @property
    def kind(self) -> str:
        return self.architecture.kind

    @property
    def width(self) -> int:
        return self.architecture.width

    @property
    def inner(self) -> int:
        return self.architecture.inner

    @property
    def num_layers(self) -> int:
        return self.architecture.num_layers

    @property
    def vocabulary(self) -> int:
        return self.architecture.vocabulary

    def config(self) -> dict[str, Any]:
        """The arguments of the transformers configuration of `kind`."""
        return {key: value for key, value in self.facts.items() if key != "model_type"} | {
            "bos_token_id": 0,
            "eos_token_id": 0,
        }

    def of_depth(self, num_layers: int | None) -> Shape:
        """The shape with fewer layers. The edited layers keep their numbers if one layer remains
        above them.
        """
        if num_layers is None or num_layers == self.num_layers:
            return self
        if not 2 <= num_layers <= self.num_layers:
            problem = f"this model has {self.num_layers} layers"
            expected = f"2 to {self.num_layers}"
            raise ConfigError(message("--layers", problem, got=num_layers, expected=expected))
        memit = tuple(layer for layer in self.memit_layers if layer < num_layers - 1)
        if len(memit) < len(self.memit_layers):
            memit = tuple(range(max(0, num_layers - 1 - len(self.memit_layers)), num_layers - 1))
        return replace(
            self,
            facts=self.architecture.of_depth(num_layers).facts,
            rome_layer=min(self.rome_layer, num_layers - 2),
            memit_layers=memit,
        )


def model_shapes() -> dict[str, Shape]:
    """All shapes by name. `nano` is for tests."""
    known = known_facts()
    tiny = facts_without_download("tiny-gpt2", "asset:tiny-gpt2")
    assert tiny is not None
    nano = {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "vocab_size": 400,
        "n_positions": 128,
    }
    sizes = {
        name: tiny[name]
        for name in ("model_type", "n_embd", "n_layer", "n_head", "vocab_size", "n_positions")
    }
    small = {
        "nano": Shape(facts=nano, rome_layer=1, memit_layers=(0, 1)),
        "tiny-gpt2": Shape(facts=sizes, rome_layer=2, memit_layers=(0, 1, 2)),
    }
    return small | {
        name: Shape(facts=facts, rome_layer=_edited(name)[0], memit_layers=_edited(name)[1])
        for name, facts in known.items()
    }


def _edited(name: str) -> tuple[int, tuple[int, ...]]:
    """The layers of ROME and MEMIT. Without a published choice, layers in the lower third."""
    published = {
        "gpt2-medium": (8, (4, 5, 6, 7, 8)),
        "gpt2-xl": (17, (13, 14, 15, 16, 17)),
        "gptj-6b": (5, (4, 5, 6, 7, 8)),  # published: 3 to 8
        "gpt2": (3, (1, 2, 3, 4, 5)),
    }
    return published.get(name, (5, (4, 5, 6, 7, 8)))


def shapes() -> dict[str, tuple[int, int]]:
    """(O, I) of the MLP's down projection, by model."""
    return {name: (shape.width, shape.inner) for name, shape in model_shapes().items()}
