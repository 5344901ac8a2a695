"""The two forward passes of a target search: the whole network in every step, or a cached suffix.

delta changes the site's output at the subject's last token, and the site's output is added to the
residual stream of its block. The blocks up to this one and all earlier tokens therefore run once.
Each step of the search runs the tokens from the subject's last one on through the blocks above.
Both forwards take any number of requests together. A row of the batch is a request in one context.

Shape letters: N requests, B sequences, S tokens from the subject's last one on, T all tokens, D
residual width, O width of the site's output, M pairs whose logits are read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from editkit.lazy import torch
from editkit.model import cached_suffix
from editkit.model.capture import add_to_output, capture
from editkit.model.logits import read, read_sliced
from editkit.model.tokens import PromptBatch, pad
from editkit.targets.descent import ForwardResult
from editkit.targets.sequences import Readout, Sequences, readout_of

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainForward:
    """The whole network over all sequences, then its head at the positions that are read."""

    model: EditableModel
    site: str
    requests: tuple[Sequences, ...]
    side: Literal["left", "right"]
    batch: PromptBatch
    owner_B: torch.Tensor  # the request of each row
    sites_B: torch.Tensor  # columns of the subject's last tokens
    readout: Readout

    def __call__(self, delta_NO: torch.Tensor, before_NV: torch.Tensor | None) -> ForwardResult:
        with add_to_output(self.model, self.site, self.sites_B, delta_NO[self.owner_B]):
            hidden_BTD = self.model.final_hidden(self.batch)
        columns_M = self.batch.first_B[self.readout.rows_M] + self.readout.positions_M
        readings = read(
            self.model, hidden_BTD[self.readout.rows_M, columns_M], self.readout.ids_K, before_NV
        )
        return ForwardResult(self.readout.means(readings.log_p_K), readings.kl_N, readings.log_p_NV)

    def only(self, kept: Sequence[int]) -> PlainForward:
        return plain_forward(
            self.model, self.site, [self.requests[index] for index in kept], side=self.side
        )


def plain_forward(
    model: EditableModel,
    site: str,
    requests: Sequence[Sequences],
    *,
    side: Literal["left", "right"] = "right",
) -> PlainForward:
    """The function of delta that a search minimises, computed by the whole network."""
    batch = pad(
        [ids for sequences in requests for ids in sequences.ids], device=model.device, side=side
    )
    return PlainForward(
        model=model,
        site=site,
        requests=tuple(requests),
        side=side,
        batch=batch,
        owner_B=_owners(requests, model.device),
        sites_B=batch.columns([position for sequences in requests for position in sequences.sites]),
        readout=readout_of(requests, device=model.device),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class SuffixForward:
    """The same function of delta up to rounding.

    The suffix begins after the site's block, whose output then moves by delta itself; or before it,
    where a norm or a factor stands between the site and the residual stream.
    """

    requests: tuple[Sequences, ...]
    inside: str | None  # the site, if the suffix begins before its block
    suffix: cached_suffix.CachedSuffix
    owner_B: torch.Tensor
    columns_M: torch.Tensor  # the positions that are read, counted from the subject's last token
    readout: Readout

    def __call__(self, delta_NO: torch.Tensor, before_NV: torch.Tensor | None) -> ForwardResult:
        hidden_BSD, delta_BO = self.suffix.hidden_BSD, delta_NO[self.owner_B]
        if self.inside is None:
            moved_B1D = hidden_BSD[:, :1] + delta_BO.to(hidden_BSD)[:, None]
            final_BSD = self.suffix.run(torch.cat([moved_B1D, hidden_BSD[:, 1:]], dim=1))
        else:
            with add_to_output(
                self.suffix.model, self.inside, torch.zeros_like(self.owner_B), delta_BO
            ):
                final_BSD = self.suffix.run(hidden_BSD)
        final_MD = final_BSD[self.readout.rows_M, self.columns_M]
        readings = read_sliced(self.suffix.model, final_MD, self.readout.ids_K, before_NV)
        return ForwardResult(self.readout.means(readings.log_p_K), readings.kl_N, readings.log_p_NV)

    def only(self, kept: Sequence[int]) -> SuffixForward:
        first = [0, *accumulate(len(sequences.ids) for sequences in self.requests)]
        rows = [row for index in kept for row in range(first[index], first[index + 1])]
        requests = [self.requests[index] for index in kept]
        return _suffix_forward(requests, self.suffix.only(rows), self.inside)


def suffix_layer(model: EditableModel, site: str, sequences: Sequences) -> int | None:
    """The layer above which the suffix begins if `site` changes; None if the whole network must
    run.

    The suffix begins above the site's block if the site is the block, or an MLP whose output is
    added to the residual stream unchanged; else below it.

    The whole network must run if the shortcut is wrong for it (`EditableModel.shortcuts`), if there
    is no block below the site's, if no norm follows the site's block, or if a sliding window is
    shorter than the sequences.
    """
    if not model.shortcuts.allows("search"):
        return None
    if not cached_suffix.supports_caching(model, max(map(len, sequences.ids))):
        return None
    layer = _layer_of(model, site)
    if layer is None or not _is_added(model, site, layer):
        return layer - 1 if layer else None
    is_last = layer == model.num_layers - 1 and model.family.final_norm is None
    return None if is_last else layer


def _layer_of(model: EditableModel, site: str) -> int | None:
    """The layer whose block is or contains the site."""
    layers = range(model.num_layers)
    return next((k for k in layers if f"{site}.".startswith(f"{model.family.block(k)}.")), None)


def _is_added(model: EditableModel, site: str, layer: int) -> bool:
    """Whether a change of the site's output changes that of its block by the same vector."""
    family = model.family
    return site == family.block(layer) or (site == family.mlp(layer) and family.adds_mlp_output)


def suffix_forward(
    model: EditableModel,
    site: str,
    layer: int,
    requests: Sequence[Sequences],
    *,
    least_shared: int | None = None,
) -> tuple[SuffixForward, torch.Tensor]:
    """The function of delta, and the site's outputs for the clean prompts, (N, O), at least
    float32.

    The lower blocks run here once. See `cached_suffix.prepare` for `least_shared`.
    """
    above = layer + 1
    is_inside = above < model.num_layers and _layer_of(model, site) == above
    prepared = cached_suffix.prepare(
        model,
        layer,
        [ids for sequences in requests for ids in sequences.ids],
        [position for sequences in requests for position in sequences.sites],
        reads=[positions for sequences in requests for positions in sequences.reads],
        at_start=[site],
        through=above if is_inside else layer,
        # All requests share the prefix of a context.
        groups=[row for sequences in requests for row in range(len(sequences.ids))],
        least_shared=least_shared,
    )
    clean_N = torch.tensor(
        [0, *accumulate(len(sequences.ids) for sequences in requests)][:-1], device=model.device
    )
    # The steps do not need `at_start`.
    forward = _suffix_forward(requests, replace(prepared, at_start={}), site if is_inside else None)
    return forward, at_least_float32(prepared.at_start[site][clean_N])


def _suffix_forward(
    requests: Sequence[Sequences], prepared: cached_suffix.CachedSuffix, inside: str | None
) -> SuffixForward:
    device = prepared.model.device
    readout = readout_of(requests, device=device)
    sites_B = torch.tensor(
        [position for sequences in requests for position in sequences.sites], device=device
    )
    return SuffixForward(
        requests=tuple(requests),
        inside=inside,
        suffix=prepared,
        owner_B=_owners(requests, device),
        columns_M=readout.positions_M - sites_B[readout.rows_M],
        readout=readout,
    )


def site_outputs(model: EditableModel, site: str, requests: Sequence[Sequences]) -> torch.Tensor:
    """v, (N, O), at least float32: the site's outputs at the subject's last token of the clean
    prompts.
    """
    batch = pad([sequences.ids[0] for sequences in requests], device=model.device)
    with torch.no_grad(), capture(model, outputs=[site]) as captured:
        model.final_hidden(batch)
    columns_N = batch.columns([sequences.sites[0] for sequences in requests])
    return at_least_float32(
        captured.outputs[site][torch.arange(len(requests), device=model.device), columns_N]
    )


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _owners(requests: Sequence[Sequences], device: torch.device) -> torch.Tensor:
    """(B,): the request of each row."""
    return torch.tensor(
        [owner for owner, sequences in enumerate(requests) for _ in sequences.ids], device=device
    )
