"""Log-probabilities of tokens and a KL divergence from hidden states, with one pass over the head's
weights fewer.

For a few rows, the product with the V x D matrix of the head costs as much as reading the matrix,
and the gradient reads it again. The gradients of these values are means of the matrix's rows under
the predicted distribution. They can be accumulated as in online softmax (Milakov & Gimelshein 2018,
arXiv 1805.02867). Each slice of the matrix serves both computations while it is in the CPU cache,
and no row of V weights is kept.

    d log p(t) / dh      = w_t - E_p[w]                                p = softmax(l), l_v = w_v . h
    + b_v d KL(p || q) / dh    = E_p[(l - log q) w] - E_p[l - log q] E_p[w]

Shape letters: K rows with a token, N rows with a divergence, M = K + N, D width, V vocabulary, S
slice of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.lazy import torch

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

SLICE_BYTES = 1 << 22  # of the head's weights: fits into a CPU cache together with the other data


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Readings:
    """Values of at least float32. Gradients flow through `log_p_K` and `kl_N`."""

    log_p_K: torch.Tensor
    kl_N: torch.Tensor
    log_p_NV: torch.Tensor  # detached; a later divergence may be measured from it
    top_K: torch.Tensor | None  # detached: log p of the most probable token, if asked for


def read(
    model: EditableModel,
    hidden_MD: torch.Tensor,
    ids_K: torch.Tensor,
    before_NV: torch.Tensor | None,
    *,
    with_top: bool = False,
) -> Readings:
    """log p of a token in each of the first K rows, and KL(p || before) in the other N rows.

    The divergence is 0 if `before_NV` is None. `with_top` asks for the most probable tokens.
    """
    logits_MV = model.hidden_to_logits(hidden_MD)
    log_p_MV = logits_MV.to(torch.promote_types(logits_MV.dtype, torch.float32)).log_softmax(dim=-1)
    log_p_KV, log_p_NV = log_p_MV[: len(ids_K)], log_p_MV[len(ids_K) :]
    return Readings(
        log_p_K=log_p_KV.gather(1, ids_K[:, None])[:, 0],
        kl_N=log_p_NV.new_zeros(len(log_p_NV))
        if before_NV is None
        else divergence(log_p_NV, before_NV),
        log_p_NV=log_p_NV.detach(),
        top_K=log_p_KV.detach().amax(dim=1) if with_top else None,
    )


def divergence(log_p_NV: torch.Tensor, before_NV: torch.Tensor) -> torch.Tensor:
    """KL(p || before), (N,)."""
    return torch.nn.functional.kl_div(before_NV, log_p_NV, reduction="none", log_target=True).sum(
        dim=-1
    )


def read_sliced(
    model: EditableModel,
    hidden_MD: torch.Tensor,
    ids_K: torch.Tensor,
    before_NV: torch.Tensor | None,
    *,
    with_top: bool = False,
) -> Readings:
    """The values of `read` to rounding, with the gradients computed in the same pass.

    It calls `read` itself on a GPU, in half precision, or if the head is more than a matrix, where
    the slices would not save time or would not be exact.
    """
    head = model.network.get_output_embeddings()
    if (
        not model.head_is_matrix
        or hidden_MD.device.type != "cpu"
        or hidden_MD.dtype not in (torch.float32, torch.float64)
    ):
        return read(model, hidden_MD, ids_K, before_NV, with_top=with_top)
    with torch.no_grad():
        values, gradient_MD = _sliced(head.weight, head.bias, hidden_MD.detach(), ids_K, before_NV)
    # Adds exactly zero, and carries the gradient computed above.
    slope_M = ((hidden_MD - hidden_MD.detach()) * gradient_MD).sum(dim=1)
    return Readings(
        log_p_K=values.log_p_K + slope_M[: len(ids_K)],
        kl_N=values.kl_N + slope_M[len(ids_K) :],
        log_p_NV=values.log_p_NV,
        top_K=values.top_K if with_top else None,
    )


def _sliced(
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    hidden_MD: torch.Tensor,
    ids_K: torch.Tensor,
    before_NV: torch.Tensor | None,
) -> tuple[Readings, torch.Tensor]:
    """The values without a graph, and the gradient of each row's value by its hidden state."""
    num_tokens, (num_rows, width) = len(ids_K), hidden_MD.shape
    num_words = len(weight_VD)
    has_kl = before_NV is not None
    top_M = hidden_MD.new_full((num_rows,), -torch.inf)
    # Sums of exp(l - top) times 1 and w. The last N rows also need sums times (l - log q), measured
    # from a reference so that no large terms cancel.
    mass_M, mean_MD = hidden_MD.new_zeros(num_rows), hidden_MD.new_zeros(num_rows, width)
    excess_N, tilt_ND = (
        hidden_MD.new_zeros(num_rows - num_tokens),
        hidden_MD.new_zeros(num_rows - num_tokens, width),
    )
    reference_N1 = hidden_MD.new_zeros(num_rows - num_tokens, 1)
    logits_NV = hidden_MD.new_empty(num_rows - num_tokens, num_words)
    step = max(1, SLICE_BYTES // (width * weight_VD.element_size()))
    for start in range(0, num_words, step):
        words = slice(start, start + step)
        weight_SD = weight_VD[words]
        logits_MS = torch.nn.functional.linear(
            hidden_MD, weight_SD, None if bias_V is None else bias_V[words]
        )
        logits_NV[:, words] = logits_MS[num_tokens:]
        before_M, top_M = top_M, torch.maximum(top_M, logits_MS.amax(dim=1))
        fade_M, weights_MS = (before_M - top_M).exp(), (logits_MS - top_M[:, None]).exp_()
        mass_M = mass_M * fade_M + weights_MS.sum(dim=1)
        if before_NV is None:
            mean_MD = torch.addmm(mean_MD * fade_M[:, None], weights_MS, weight_SD)
            continue
        ratio_NS = logits_MS[num_tokens:] - before_NV[:, words]
        if start == 0:
            reference_N1 = ratio_NS.mean(dim=1, keepdim=True)
        tilted_NS = weights_MS[num_tokens:] * (ratio_NS - reference_N1)
        fade_N = fade_M[num_tokens:]
        excess_N = excess_N * fade_N + tilted_NS.sum(dim=1)
        sums_MD = torch.cat([mean_MD * fade_M[:, None], tilt_ND * fade_N[:, None]])
        sums_MD = torch.addmm(sums_MD, torch.cat([weights_MS, tilted_NS]), weight_SD)
        mean_MD, tilt_ND = sums_MD[:num_rows], sums_MD[num_rows:]
    log_mass_M, mean_MD = top_M + mass_M.log(), mean_MD / mass_M[:, None]
    own_KD = weight_VD[ids_K]
    logit_K = (hidden_MD[:num_tokens] * own_KD).sum(dim=1) + (
        0.0 if bias_V is None else bias_V[ids_K]
    )
    mass_N = mass_M[num_tokens:]
    excess_N, tilt_ND = excess_N / mass_N, tilt_ND / mass_N[:, None]
    kl_N = excess_N + reference_N1[:, 0] - log_mass_M[num_tokens:] if has_kl else excess_N
    gradient_MD = torch.cat(
        [own_KD - mean_MD[:num_tokens], tilt_ND - excess_N[:, None] * mean_MD[num_tokens:]]
    )
    values = Readings(
        log_p_K=logit_K - log_mass_M[:num_tokens],
        kl_N=kl_N,
        log_p_NV=logits_NV.sub_(log_mass_M[num_tokens:, None]),
        top_K=(top_M - log_mass_M)[:num_tokens],
    )
    return values, gradient_MD
