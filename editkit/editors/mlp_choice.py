"""Which matrices of the MLPs an editor takes: gate, up and down of some layers, each of layers of
its own if it has any.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from editkit.errors import ConfigError, message

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

Matrix = Literal["gate", "up", "down"]
ORDER: tuple[Matrix, ...] = ("gate", "up", "down")  # of a forward pass


def choice_problems(
    layers: Sequence[int],
    matrices: Sequence[Matrix],
    layers_of: Mapping[str, Sequence[int]],
) -> list[str]:
    """What is wrong with these options, as problems of an OptionError."""
    problems = []
    if not matrices or len(set(matrices)) < len(matrices):
        got, expected = list(matrices), "some of gate, up and down, each once"
        problems.append(message("matrices", "unusable choice", got=got, expected=expected))
    if unused := sorted(set(layers_of) - set(matrices)):
        expected = f"some of the edited matrices: {', '.join(matrices)}"
        problems.append(message("layers_of", "names other matrices", got=unused, expected=expected))
    named = {"layers": layers} | {f"layers_of.{matrix}": own for matrix, own in layers_of.items()}
    problems += [
        message(key, "unusable layers", got=list(own), expected="layers, each once")
        for key, own in named.items()
        if not own or len(set(own)) < len(own)
    ]
    return problems


def chosen_matrices(
    model: EditableModel,
    layers: Sequence[int],
    matrices: Sequence[Matrix],
    layers_of: Mapping[str, Sequence[int]],
) -> tuple[str, ...]:
    """From below, within a layer in the order of a forward pass.

    Raises:
        ConfigError: a layer is out of range, the MLP has no such matrix, or the model is an expert
            of a mixture, which sees only some of the tokens.
    """
    if model.family.expert is not None:
        problem = "an expert of a mixture sees some target tokens only"
        got = f"expert {model.family.expert}"
        raise ConfigError(message("editor.layers", problem, got=got))
    chosen = {matrix: layers_of.get(matrix, layers) for matrix in matrices}
    every = sorted(set(itertools.chain.from_iterable(chosen.values())))
    names = {layer: model.mlp_matrices([layer]) for layer in every}
    if "gate" in chosen and any(len(of_layer) < len(ORDER) for of_layer in names.values()):
        problem = f"the MLP of {model.name} has no separate gate"
        expected = "up, down"
        raise ConfigError(
            message("editor.matrices", problem, got=list(matrices), expected=expected)
        )
    return tuple(
        names[layer][ORDER.index(matrix) - len(ORDER)]
        for layer in every
        for matrix in ORDER
        if layer in chosen.get(matrix, ())
    )
