"""The share of each MLP neuron in the probability of an answer, by integrated gradients (Dai et al.
2022, arXiv 2104.08696, Eq. 3).

The neurons of a layer are the inputs of its down projection. With w their values at the position
that predicts a token y, and P(a) the probability of y with the values a w in their place,

    score_i = w_i * mean over the points a of dP(a)/dw_i          points in [0, 1]

All neurons of a layer are scaled together, those of the other layers are not. a w in place of w
adds (a - 1) W w to the MLP's output at that position. That is a function of a delta at the MLP, as
a target search minimises it, so that its cached suffix serves here too. The gradient of the neurons
is that of the delta times W.

Shape letters: R rows, O width of the MLP's output, I neurons of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.tokens import pad
from editkit.targets.forwards import (
    at_least_float32,
    plain_forward,
    suffix_forward,
    suffix_layer,
)
from editkit.targets.sequences import Sequences

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.targets.descent import Forward


def row_of(ids: Sequence[int], token: int) -> Sequences:
    """The text `ids`, whose last position predicts the token."""
    last = len(ids) - 1
    return Sequences(
        ids=(tuple(ids),),
        sites=(last,),
        predicting=(range(last, last + 1),),
        targets=((token,),),
        kl_position=None,
    )


def neurons_of(
    model: EditableModel, modules: Sequence[str], rows: Sequence[Sequences]
) -> dict[str, torch.Tensor]:
    """By down projection, its inputs at the end of each row, (R, I), at least float32."""
    batch = pad([row.ids[0] for row in rows], device=model.device)
    with torch.no_grad(), capture(model, inputs=modules) as captured:
        model.final_hidden(batch)
    columns_R = batch.columns([row.sites[0] for row in rows])
    rows_R = torch.arange(len(rows), device=model.device)
    return {name: at_least_float32(captured.inputs[name][rows_R, columns_R]) for name in modules}


def attributions(
    model: EditableModel,
    layer: int,
    rows: Sequence[Sequences],
    neurons_RI: torch.Tensor,
    *,
    points: Sequence[float],
    rows_at_once: int,
) -> torch.Tensor:
    """The scores of a layer's neurons in each row, (R, I), in the dtype of `neurons_RI`."""
    site = model.family.mlp(layer)
    weight_OI = model.weight(model.family.down_projection(layer)).to(neurons_RI)
    outputs_RO = neurons_RI @ weight_OI.T
    below = {suffix_layer(model, site, row) for row in rows}
    start = below.pop()
    forward: Forward
    if below or start is None:
        forward = plain_forward(model, site, rows)
    else:
        forward, _ = suffix_forward(model, site, start, rows)
    slopes_RO = torch.zeros_like(outputs_RO)
    pairs = [(row, point) for point in points for row in range(len(rows))]
    for first in range(0, len(pairs), rows_at_once):
        places, scales = zip(*pairs[first : first + rows_at_once], strict=True)
        places_B = torch.tensor(places, device=outputs_RO.device)
        scales_B = torch.tensor(scales, dtype=outputs_RO.dtype, device=outputs_RO.device)
        with torch.enable_grad():
            delta_BO = ((scales_B - 1)[:, None] * outputs_RO[places_B]).requires_grad_()
            probability_B = forward.only(places)(delta_BO, None).log_p_NC[:, 0].exp()
            (slope_BO,) = torch.autograd.grad(probability_B.sum(), delta_BO)
        slopes_RO.index_add_(0, places_B, slope_BO)
    return neurons_RI * (slopes_RO @ weight_OI) / len(points)
