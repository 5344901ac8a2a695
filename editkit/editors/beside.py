"""What editors share that put something beside one matrix.

Shape letters: N tokens, I input width of the matrix, T tokens (padded).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.standing import standing
from editkit.model.tokens import pad

if TYPE_CHECKING:
    from editkit.model.beside import AbstractSide
    from editkit.model.editable import EditableModel
    from editkit.model.side_value import AbstractBeside

Matrix = Literal["down", "up"]


def layer_problems(layers: Sequence[int]) -> list[str]:
    """Why these are not one layer."""
    if len(layers) == 1:
        return []
    problem = "the editor acts at one layer"
    return [message("layers", problem, got=list(layers), expected="one layer")]


def matrix_beside(model: EditableModel, layers: Sequence[int], matrix: Matrix) -> str:
    """The down projection of the layer, or the matrix before it (of a gated MLP, the second of the
    two).

    Raises:
        ConfigError: the layer is out of range, or the model is an expert of a mixture, which sees
            only some of the tokens.
    """
    if model.family.expert is not None:
        problem = "nothing can stand beside one expert of a mixture, which sees some tokens only"
        raise ConfigError(message("editor.layers", problem, got=f"expert {model.family.expert}"))
    if matrix == "down":
        return model.down_projections(layers)[0]
    return model.mlp_matrices(layers)[-2]


@contextlib.contextmanager
def without_own(
    model: EditableModel, kind: type[AbstractSide], module: str
) -> Iterator[tuple[AbstractBeside, ...]]:
    """Inside the block, an editor may attach what it searches in place of its own side, with the
    sides of others, which are returned. At the end, also after an error, all former sides stand
    there again.
    """
    others = tuple(
        side for side in model.sides if not isinstance(side, kind) or side.module != module
    )
    with standing(model, others):
        yield others


def inputs_of(
    model: EditableModel, module: str, texts: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """(N, I) by text: the module's inputs at its tokens."""
    batch = pad(texts, device=model.device)
    with torch.no_grad(), capture(model, inputs=[module]) as captured:
        model.final_hidden(batch)
    return [row_TI[: len(ids)] for row_TI, ids in zip(captured.inputs[module], texts, strict=True)]
