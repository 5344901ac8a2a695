"""The state of a descent, its Adam updates, and a stop check that does not wait for the device.

Shape letters: N requests, K active requests, C contexts, S sites, O width of the sites' outputs, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from editkit.lazy import torch

DECAYS, EPSILON = (0.9, 0.999), 1e-8  # torch's defaults for Adam, as in the published code


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DescentState:
    """The state of the active requests.

    It may contain requests that have ended but that no stop check has removed yet. `is_active_K`
    freezes their values.
    """

    ids_K: torch.Tensor  # indices among the N requests
    size_KS: torch.Tensor  # |v|
    lr_KS: torch.Tensor
    nll_weight_K: torch.Tensor  # of -log p in the loss
    delta_KO: torch.Tensor
    first_KO: torch.Tensor  # Adam's moments
    second_KO: torch.Tensor
    gradients_KO: torch.Tensor  # sum of all gradients
    updates_K: torch.Tensor
    at_top_K: torch.Tensor  # number of losses at which the target was the most probable text
    loss_K: torch.Tensor  # the last computed loss
    is_active_K: torch.Tensor
    free_KO: torch.Tensor | None
    log_p_KC: torch.Tensor | None = None  # of the same forward pass as `loss_K`
    before_KC: torch.Tensor | None = None  # log_p at delta = 0
    before_KV: torch.Tensor | None = None  # log-distribution at delta = 0

    def with_losses(
        self, loss_K: torch.Tensor, log_p_KC: torch.Tensor, *, stop_loss: float
    ) -> DescentState:
        """The state with new losses of the active requests.

        A request ends if its loss is below `stop_loss` or not finite.
        """
        loss_K, log_p_KC = loss_K.detach(), log_p_KC.detach()
        known_KC = log_p_KC if self.log_p_KC is None else self.log_p_KC
        return replace(
            self,
            loss_K=torch.where(self.is_active_K, loss_K, self.loss_K),
            log_p_KC=torch.where(self.is_active_K[:, None], log_p_KC, known_KC),
            is_active_K=self.is_active_K & loss_K.isfinite() & (loss_K >= stop_loss),
        )

    def with_top(self, is_top_K: torch.Tensor, times: int) -> DescentState:
        """The state with one more loss at the target's top, after `times` of which a request
        ends.
        """
        at_top_K = self.at_top_K + is_top_K
        return replace(self, at_top_K=at_top_K, is_active_K=self.is_active_K & (at_top_K < times))

    def updated(self, gradient_KO: torch.Tensor, *, step: int, clamp: float) -> DescentState:
        """The state after one update of Adam, projected onto |delta| <= clamp * |v|.

        `step` counts from 1.
        """
        is_active_K1 = self.is_active_K[:, None]
        gradients_KO = self.gradients_KO + torch.where(is_active_K1, gradient_KO, 0.0)
        if self.free_KO is not None:
            # Adam's step is exactly zero for an entry that never has a gradient.
            gradient_KO = gradient_KO.masked_fill(~self.free_KO, 0.0)
        first_KO = self.first_KO.lerp(gradient_KO, 1 - DECAYS[0])
        second_KO = torch.addcmul(
            self.second_KO * DECAYS[1], gradient_KO, gradient_KO, value=1 - DECAYS[1]
        )
        shrunk, root = 1 - DECAYS[0] ** step, (1 - DECAYS[1] ** step) ** 0.5
        num_sites = self.size_KS.shape[1]
        width = self.delta_KO.shape[1] // num_sites
        delta_KO = self.delta_KO - (self.lr_KS / shrunk).repeat_interleave(
            width, dim=1
        ) * first_KO / (second_KO.sqrt() / root + EPSILON)
        length_KS, limit_KS = by_site(delta_KO, num_sites), clamp * self.size_KS
        scale_KS = torch.where(length_KS > limit_KS, limit_KS / length_KS, 1.0)
        delta_KO = delta_KO * scale_KS.repeat_interleave(width, dim=1)
        return replace(
            self,
            delta_KO=torch.where(is_active_K1, delta_KO, self.delta_KO),
            first_KO=first_KO,
            second_KO=second_KO,
            gradients_KO=gradients_KO,
            updates_K=self.updates_K + self.is_active_K,
        )

    def only(self, kept_K: torch.Tensor) -> DescentState:
        """The state of some of the requests."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        kept: dict[str, Any] = {
            name: None if value is None else value[kept_K] for name, value in values.items()
        }
        return DescentState(**kept)


def by_site(values_KO: torch.Tensor, num_sites: int) -> torch.Tensor:
    """The norm of each site's part, (K, S)."""
    norm_KS: torch.Tensor = torch.linalg.vector_norm(values_KO.unflatten(1, (num_sites, -1)), dim=2)
    return norm_KS


def merged(parts: list[DescentState]) -> DescentState:
    """The state of all requests in their original order."""
    order_N = torch.cat([part.ids_K for part in parts]).argsort()
    values: dict[str, Any] = {
        field.name: [getattr(part, field.name) for part in parts] for field in fields(DescentState)
    }
    joined: dict[str, Any] = {
        name: None if tensors[0] is None else torch.cat(tensors)[order_N]
        for name, tensors in values.items()
    }
    return DescentState(**joined)


class StopCheck:
    """Reports which requests are still active.

    A delayed check reports the state of the previous step, because on a GPU the current state would
    only be known after the current step. A request that has ended is then computed for one more
    step at most, whose results are discarded.
    """

    def __init__(self, ids: Sequence[int], *, is_delayed: bool) -> None:
        self._is_delayed = is_delayed
        self._is_active = dict.fromkeys(ids, True)
        self._pending: tuple[Sequence[int], torch.Tensor, Any] | None = None

    def active(self, ids: Sequence[int], is_active_K: torch.Tensor) -> list[bool]:
        """By request, whether it is active as far as is known. `is_active_K` is the current
        state.
        """
        if not self._is_delayed:
            return is_active_K.tolist()
        if self._pending is not None:
            previous_ids, previous_K, event = self._pending
            if event is not None:
                event.synchronize()  # of the previous step, which has finished or nearly so
            self._is_active |= zip(previous_ids, previous_K.tolist(), strict=True)
        event = torch.cuda.Event() if is_active_K.device.type == "cuda" else None
        self._pending = tuple(ids), is_active_K.to("cpu", non_blocking=True), event
        if event is not None:
            event.record()
        return [self._is_active[id] for id in ids]
