"""The target search without the work that cannot change its answer: `optimise` over a continuation instead of the whole network.

delta changes the site's output at the subject's last token, and the site feeds the residual stream right after its block. So the blocks up
to that one, and all earlier tokens, are run once; each step of the search runs the tokens from the subject's last one on through the blocks
above.

Shape letters as in `search`; S tokens from the subject's last one on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.continuation import can_continue, prepare

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.targets.search import Forward, Sequences


def continued_layer(model: EditableModel, site: str, sequences: Sequences) -> int | None:
    """The layer that can be gone on from when `site` is changed; None where only the whole network will do.

    That is so where the site is neither a block nor an MLP whose output is added to the residual stream as it is, and where a sliding
    window is shorter than the sequences.
    """
    if not can_continue(model, max(map(len, sequences.ids))):
        return None
    for layer in range(model.num_layers):
        if site == model.family.block(layer) or (site == model.family.mlp(layer) and model.family.adds_mlp_output):
            return layer
    return None


def continued_forward(model: EditableModel, layer: int, sequences: Sequences) -> Forward:
    """The same function of delta as `plain_forward` at a site of this layer, to rounding."""
    continuation = prepare(model, layer, sequences.ids, sequences.sites)
    rows_M, columns_M = sequences.wanted(-torch.tensor(sequences.sites, device=model.device))  # column 0 is the subject's last token

    def forward(delta_O: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden_BSD = continuation.hidden_BSD
        moved_B1D = hidden_BSD[:, :1] + delta_O.to(hidden_BSD)
        final_BSD = continuation.run(torch.cat([moved_B1D, hidden_BSD[:, 1:]], dim=1))
        return sequences.log_probabilities(model.hidden_to_logits(final_BSD[rows_M, columns_M]))

    return forward
