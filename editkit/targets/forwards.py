"""The two forward passes of a target search: the whole network in every step, or a cached suffix.

delta changes the site's output at the subject's last token, and the site's output is added to the
residual stream of its block. The blocks up to this one and all earlier tokens therefore run once.
Each step of the search runs the tokens from the subject's last one on through the blocks above.
Both forwards take any number of requests together. A row of the batch is a request in one context.

A search may have several sites in one block, such as its attention and its MLP. Its delta then has
a part for each, one after the other.

Shape letters: N requests, B sequences, S tokens from the subject's last one on, T all tokens, D
residual width, O width of the sites' outputs, M pairs whose logits are read, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from editkit.lazy import torch
from editkit.model import cached_suffix
from editkit.model.capture import add_to_output, capture
from editkit.model.logits import Readings, read, read_sliced
from editkit.model.products import Products
from editkit.model.tokens import PromptBatch, pad
from editkit.targets.descent import ForwardResult
from editkit.targets.sequences import Readout, Sequences, readout_of

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


Sites = str | tuple[str, ...]  # the module whose output delta is added to, or several


def modules_of(site: Sites) -> tuple[str, ...]:
    return (site,) if isinstance(site, str) else site


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainForward:
    """The whole network over all sequences, then its head at the positions that are read."""

    model: EditableModel
    site: Sites
    has_top: bool
    requests: tuple[Sequences, ...]
    side: Literal["left", "right"]
    batch: PromptBatch
    owner_B: torch.Tensor  # the request of each row
    sites_B: torch.Tensor  # columns of the subject's last tokens
    readout: Readout

    def __call__(self, delta_NO: torch.Tensor, before_NV: torch.Tensor | None) -> ForwardResult:
        with _added(self.model, self.site, self.sites_B, delta_NO[self.owner_B]):
            hidden_BTD = self.model.final_hidden(self.batch)
        columns_M = self.batch.first_B[self.readout.rows_M] + self.readout.positions_M
        hidden_MD, ids_K = hidden_BTD[self.readout.rows_M, columns_M], self.readout.ids_K
        readings = read(self.model, hidden_MD, ids_K, before_NV, with_top=self.has_top)
        return _result(self.readout, readings)

    def only(self, kept: Sequence[int]) -> PlainForward:
        requests = [self.requests[index] for index in kept]
        return plain_forward(self.model, self.site, requests, side=self.side, has_top=self.has_top)


def plain_forward(
    model: EditableModel,
    site: Sites,
    requests: Sequence[Sequences],
    *,
    side: Literal["left", "right"] = "right",
    has_top: bool = False,
) -> PlainForward:
    """The function of delta that a search minimises, computed by the whole network.

    `has_top`: its results have the most probable tokens as well.
    """
    batch = pad(
        [ids for sequences in requests for ids in sequences.ids], device=model.device, side=side
    )
    return PlainForward(
        model=model,
        site=site,
        has_top=has_top,
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
    inside: tuple[str, ...]  # the sites, if the suffix begins before their block
    has_top: bool
    suffix: cached_suffix.CachedSuffix
    owner_B: torch.Tensor
    columns_M: torch.Tensor  # the positions that are read, counted from the subject's last token
    readout: Readout

    def __call__(self, delta_NO: torch.Tensor, before_NV: torch.Tensor | None) -> ForwardResult:
        hidden_BSD, delta_BO = self.suffix.hidden_BSD, delta_NO[self.owner_B]
        if not self.inside:
            moved_B1D = hidden_BSD[:, :1] + delta_BO.to(hidden_BSD)[:, None]
            final_BSD = self.suffix.run(torch.cat([moved_B1D, hidden_BSD[:, 1:]], dim=1))
        else:
            with _added(self.suffix.model, self.inside, torch.zeros_like(self.owner_B), delta_BO):
                final_BSD = self.suffix.run(hidden_BSD)
        final_MD, ids_K = final_BSD[self.readout.rows_M, self.columns_M], self.readout.ids_K
        model = self.suffix.model
        readings = read_sliced(model, final_MD, ids_K, before_NV, with_top=self.has_top)
        return _result(self.readout, readings)

    def only(self, kept: Sequence[int]) -> SuffixForward:
        first = [0, *accumulate(len(sequences.ids) for sequences in self.requests)]
        rows = [row for index in kept for row in range(first[index], first[index + 1])]
        requests = [self.requests[index] for index in kept]
        return _suffix_forward(requests, self.suffix.only(rows), self.inside, self.has_top)


def suffix_layer(model: EditableModel, site: Sites, sequences: Sequences) -> int | None:
    """The layer above which the suffix begins if `site` changes; None if the whole network must
    run.

    The suffix begins above the site's block if the site is the block, or an MLP whose output is
    added to the residual stream unchanged; else below it, as for several sites.

    The whole network must run if the shortcut is wrong for it (`EditableModel.shortcuts`), if there
    is no block below the site's, if no norm follows the site's block, or if a sliding window is
    shorter than the sequences.
    """
    if not model.shortcuts.allows("search"):
        return None
    if not cached_suffix.supports_caching(model, max(map(len, sequences.ids))):
        return None
    [layer, *others] = {_layer_of(model, name) for name in modules_of(site)}
    if others:
        return None
    if layer is None or not (isinstance(site, str) and _is_added(model, site, layer)):
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
    site: Sites,
    layer: int,
    requests: Sequence[Sequences],
    *,
    least_shared: int | None = None,
    has_top: bool = False,
    products: Products = "float32",
) -> tuple[SuffixForward, torch.Tensor]:
    """The function of delta, and the sites' outputs for the clean prompts, (N, O), at least
    float32.

    The lower blocks run here once. See `cached_suffix.prepare` for `least_shared`, and
    `plain_forward` for `has_top`. `products` is the dtype of the products of a float32 network's
    linear layers in the suffix.
    """
    above, sites = layer + 1, modules_of(site)
    is_inside = above < model.num_layers and _layer_of(model, sites[0]) == above
    prepared = cached_suffix.prepare(
        model,
        layer,
        [ids for sequences in requests for ids in sequences.ids],
        [position for sequences in requests for position in sequences.sites],
        reads=[positions for sequences in requests for positions in sequences.reads],
        at_start=sites,
        through=above if is_inside else layer,
        # All requests share the prefix of a context.
        groups=[row for sequences in requests for row in range(len(sequences.ids))],
        least_shared=least_shared,
    )
    if products == "bfloat16":
        prepared = prepared.with_rounded_products()
    clean_N = torch.tensor(
        [0, *accumulate(len(sequences.ids) for sequences in requests)][:-1], device=model.device
    )
    # The steps do not need `at_start`.
    inside = sites if is_inside else ()
    forward = _suffix_forward(requests, replace(prepared, at_start={}), inside, has_top)
    clean_NO = torch.cat([prepared.at_start[name][clean_N] for name in sites], dim=1)
    return forward, at_least_float32(clean_NO)


def _suffix_forward(
    requests: Sequence[Sequences],
    prepared: cached_suffix.CachedSuffix,
    inside: tuple[str, ...],
    has_top: bool,
) -> SuffixForward:
    device = prepared.model.device
    readout = readout_of(requests, device=device)
    sites_B = torch.tensor(
        [position for sequences in requests for position in sequences.sites], device=device
    )
    return SuffixForward(
        requests=tuple(requests),
        inside=inside,
        has_top=has_top,
        suffix=prepared,
        owner_B=_owners(requests, device),
        columns_M=readout.positions_M - sites_B[readout.rows_M],
        readout=readout,
    )


def site_outputs(model: EditableModel, site: Sites, requests: Sequence[Sequences]) -> torch.Tensor:
    """v, (N, O), at least float32: the sites' outputs at the subject's last token of the clean
    prompts.
    """
    sites = modules_of(site)
    batch = pad([sequences.ids[0] for sequences in requests], device=model.device)
    with torch.no_grad(), capture(model, outputs=sites) as captured:
        model.final_hidden(batch)
    columns_N = batch.columns([sequences.sites[0] for sequences in requests])
    rows_N = torch.arange(len(requests), device=model.device)
    outputs = [captured.outputs[name][rows_N, columns_N] for name in sites]
    return at_least_float32(torch.cat(outputs, dim=1))


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


@contextmanager
def _added(
    model: EditableModel, site: Sites, columns_B: torch.Tensor, delta_BO: torch.Tensor
) -> Iterator[None]:
    """Adds each site's part of delta to its output."""
    sites = modules_of(site)
    with ExitStack() as added:
        for name, part_BO in zip(sites, delta_BO.chunk(len(sites), dim=1), strict=True):
            added.enter_context(add_to_output(model, name, columns_B, part_BO))
        yield


def _result(readout: Readout, readings: Readings) -> ForwardResult:
    top_K = readings.top_K
    return ForwardResult(
        readout.means(readings.log_p_K),
        readings.kl_N,
        readings.log_p_NV,
        None if top_K is None else readout.means(top_K),
    )


def _owners(requests: Sequence[Sequences], device: torch.device) -> torch.Tensor:
    """(B,): the request of each row."""
    return torch.tensor(
        [owner for owner, sequences in enumerate(requests) for _ in sequences.ids], device=device
    )
