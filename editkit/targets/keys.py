"""Keys: what goes into a matrix at the subject's last token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.tokens import pad
from editkit.targets.sequences import locate
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


def keys_and_outputs(
    model: EditableModel, request: EditRequest, *, module: str, contexts: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into and comes out of a module at the subject's last token in each context: (C, I)
    and (C, O), float64.
    """
    encoded, positions = locate(model, request, contexts)
    # Nothing behind the subject can reach it: the network is causal.
    batch = pad(
        [
            sequence.ids[: position + 1]
            for sequence, position in zip(encoded, positions, strict=True)
        ],
        device=model.device,
    )
    with torch.no_grad(), capture(model, inputs=[module], outputs=[module]) as captured:
        model.final_hidden(batch)
    rows_C, columns_C = torch.arange(len(contexts), device=model.device), batch.columns(positions)
    return captured.inputs[module][rows_C, columns_C].double(), captured.outputs[module][
        rows_C, columns_C
    ].double()
