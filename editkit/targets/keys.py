"""Keys and values: the inputs and outputs of a matrix at the subject's last token.

Shape letters: O d_out, I d_in, N requests, C contexts, M texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.layerwise import LayerwiseForward
from editkit.model.tokens import pad
from editkit.targets.sequences import locate
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


ROWS_AT_ONCE = 256  # of a forward pass; bounds memory, changes no result beyond rounding

# One text as token ids, up to the subject's last token: no later token can reach it.
Text = tuple[int, ...]


def keys_and_outputs(
    model: EditableModel, request: EditRequest, *, module: str, contexts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs and outputs of a module at the subject's last token in each context: (C, I) and
    (C, O), float64.
    """
    texts = subject_texts(model, request, contexts)
    batch = pad(texts, device=model.device)
    with torch.no_grad(), capture(model, inputs=[module], outputs=[module]) as captured:
        model.final_hidden(batch)
    rows_C = torch.arange(len(contexts), device=model.device)
    columns_C = batch.columns([len(text) - 1 for text in texts])
    keys_CI, outputs_CO = captured.inputs[module], captured.outputs[module]
    return keys_CI[rows_C, columns_C].double(), outputs_CO[rows_C, columns_C].double()


def subject_texts(
    model: EditableModel, request: EditRequest, contexts: Sequence[str]
) -> tuple[Text, ...]:
    """The request in each context, up to the subject's last token."""
    encoded, positions = locate(model, request, contexts)
    return tuple(
        tuple(sequence.ids[: position + 1])
        for sequence, position in zip(encoded, positions, strict=True)
    )


def layerwise(model: EditableModel, texts: Sequence[Sequence[Text]]) -> LayerwiseForward:
    """All texts, request by request, in passes that hold whole requests."""
    num_contexts = len(texts[0])
    rows_at_once = max(ROWS_AT_ONCE // num_contexts, 1) * num_contexts
    return LayerwiseForward(
        model, [text for of_request in texts for text in of_request], rows_at_once=rows_at_once
    )


def average_keys(forward: LayerwiseForward, layer: int, weights: Sequence[float]) -> torch.Tensor:
    """(I, N) float64: the inputs of a layer's down projection at the end of each request's texts,
    averaged with the contexts' weights.
    """
    keys_MI = forward.keys(layer)
    weights_C = torch.tensor(weights, dtype=torch.float64, device=keys_MI.device)
    return torch.einsum("nci,c->in", keys_MI.double().unflatten(0, (-1, len(weights))), weights_C)


def clean_outputs(
    forward: LayerwiseForward, layer: int, num_contexts: int, module: str | None = None
) -> torch.Tensor:
    """(O, N) float32: the output of a block, or of a module in it, at the end of each request's
    bare prompt.
    """
    return forward.every(num_contexts).outputs(layer, module).float().T
