"""The shapes of models: what a benchmark builds with random weights, and which of its layers an edit writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from editkit.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A network's sizes, and the layers that published configurations edit."""

    kind: str  # config.model_type
    width: int
    inner: int
    num_layers: int
    num_heads: int
    vocabulary: int
    num_positions: int
    rome_layer: int
    memit_layers: tuple[int, ...]  # five, where the depth allows
    num_key_value_heads: int | None = None

    def config(self) -> dict[str, Any]:
        """The arguments of the transformers configuration of `kind`."""
        common: dict[str, Any] = {"vocab_size": self.vocabulary, "bos_token_id": 0, "eos_token_id": 0}
        if self.kind == "llama":
            return common | {
                "hidden_size": self.width,
                "intermediate_size": self.inner,
                "num_hidden_layers": self.num_layers,
                "num_attention_heads": self.num_heads,
                "num_key_value_heads": self.num_key_value_heads or self.num_heads,
                "max_position_embeddings": self.num_positions,
            }
        gpt = {"n_embd": self.width, "n_inner": self.inner, "n_layer": self.num_layers, "n_head": self.num_heads}
        return common | gpt | {"n_positions": self.num_positions} | ({"rotary_dim": 64} if self.kind == "gptj" else {})

    def of_depth(self, num_layers: int | None) -> Shape:
        """The same with fewer layers; the edited ones keep their numbers as far as one layer is left above them."""
        if num_layers is None or num_layers == self.num_layers:
            return self
        if not 2 <= num_layers <= self.num_layers:
            raise ConfigError(f"--layers: this model has {self.num_layers} layers - given {num_layers} - allowed: 2 to {self.num_layers}")
        memit = tuple(layer for layer in self.memit_layers if layer < num_layers - 1)
        if len(memit) < len(self.memit_layers):
            memit = tuple(range(max(0, num_layers - 1 - len(self.memit_layers)), num_layers - 1))
        return replace(self, num_layers=num_layers, rome_layer=min(self.rome_layer, num_layers - 2), memit_layers=memit)


def model_shapes() -> dict[str, Shape]:
    """All shapes by name; `nano` is for tests."""
    return {
        "nano": _gpt2(32, 3, 4, rome_layer=1, memit_layers=(0, 1), vocabulary=400, num_positions=128),
        "tiny-gpt2": _gpt2(192, 6, 6, rome_layer=2, memit_layers=(0, 1, 2), vocabulary=2048, num_positions=256),
        "gpt2": _gpt2(768, 12, 12, rome_layer=3, memit_layers=(1, 2, 3, 4, 5)),
        "gpt2-medium": _gpt2(1024, 24, 16, rome_layer=8, memit_layers=(4, 5, 6, 7, 8)),
        "gpt2-xl": _gpt2(1600, 48, 25, rome_layer=17, memit_layers=(13, 14, 15, 16, 17)),
        "gptj-6b": Shape(
            kind="gptj",
            width=4096,
            inner=16384,
            num_layers=28,
            num_heads=16,
            vocabulary=50400,
            num_positions=2048,
            rome_layer=5,
            memit_layers=(4, 5, 6, 7, 8),  # published: 3 to 8
        ),
        "llama2-7b": _llama(11008, key_value_heads=32, vocabulary=32000, num_positions=4096),
        "llama3-8b": _llama(14336, key_value_heads=8, vocabulary=128256, num_positions=8192),
    }


def shapes() -> dict[str, tuple[int, int]]:
    """(O, I) of the MLP's down projection, by model."""
    return {name: (shape.width, shape.inner) for name, shape in model_shapes().items()}


def _gpt2(
    width: int,
    num_layers: int,
    num_heads: int,
    *,
    rome_layer: int,
    memit_layers: tuple[int, ...],
    vocabulary: int = 50257,
    num_positions: int = 1024,
) -> Shape:
    return Shape(
        kind="gpt2",
        width=width,
        inner=4 * width,
        num_layers=num_layers,
        num_heads=num_heads,
        vocabulary=vocabulary,
        num_positions=num_positions,
        rome_layer=rome_layer,
        memit_layers=memit_layers,
    )


def _llama(inner: int, *, key_value_heads: int, vocabulary: int, num_positions: int) -> Shape:
    return Shape(
        kind="llama",
        width=4096,
        inner=inner,
        num_layers=32,
        num_heads=32,
        num_key_value_heads=key_value_heads,
        vocabulary=vocabulary,
        num_positions=num_positions,
        rome_layer=5,
        memit_layers=(4, 5, 6, 7, 8),
    )
