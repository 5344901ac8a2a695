"""The minimisation of a target search, as parts that a restraint on the objective can recombine.

All requests of a batch are minimised together but independently. Each has its own distribution at
delta = 0, learning rate, clamp and end. A request that has ended keeps its values and leaves the
batch.

Shape letters: N requests, K active requests, C contexts, S sites, O width of the sites' outputs, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from editkit.lazy import torch
from editkit.targets.stepping import DescentState, StopCheck, by_site, merged

if TYPE_CHECKING:
    from editkit.targets.settings import TargetSettings

# Of log-probabilities, in nats: the target's and the most probable token's may be computed apart.
ROUNDING = 1e-4

# deltas (K, O) of the requests with these indices (K,) -> a term of each request's loss, (K,)
Penalty = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


class ForwardResult(NamedTuple):
    """The result of a forward pass. Gradients flow through `log_p_NC` and `kl_N`."""

    log_p_NC: torch.Tensor  # mean log-probability of a target's tokens in each context
    # KL(now || before) of the distributions at the KL position; 0 without a distribution before
    kl_N: torch.Tensor
    log_p_NV: torch.Tensor  # log-distribution at the KL position
    # As `log_p_NC`, of the most probable token at each place, if the forward was built so.
    top_NC: torch.Tensor | None = None


class Forward(Protocol):
    """The forward pass of the network as a function of delta."""

    def __call__(self, delta_NO: torch.Tensor, before_NV: torch.Tensor | None) -> ForwardResult:
        """The results for these deltas. The divergence is measured from the log-distribution
        `before_NV`.
        """

    def only(self, kept: Sequence[int]) -> Forward:
        """The same for some of its requests, given by their indices."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Descent:
    """The result of a descent for every request."""

    delta_NO: torch.Tensor
    loss_N: torch.Tensor  # at delta, with the penalty; without `final_loss`, before the last update
    updates_N: torch.Tensor  # number of Adam updates, including those of earlier descents
    # of the loss, over the updates of this descent; 0 without an update
    mean_gradient_NO: torch.Tensor
    at_zero: tuple[torch.Tensor, torch.Tensor]  # log_p_NC and log_p_NV at delta = 0
    log_p_NC: torch.Tensor  # of the same forward pass as `loss_N`

    @property
    def is_finite_N(self) -> torch.Tensor:
        """Whether the loss is finite. A loss that is not finite ends the descent of its request."""
        return self.loss_N.isfinite()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TargetProblem:
    """The loss of a target search (see `search`). A search is one or several descents over the same
    forward.
    """

    forward: Forward
    initial_NO: torch.Tensor  # v, at least float32
    settings: TargetSettings
    num_sites: int = 1  # delta and v have one part for each, of equal width
    # finished requests are state one step late (see `StopCheck`); the result has the same bits
    is_stop_check_delayed: bool = False
    # At a block: the output (N, O) of its MLP at the subject's last token of the clean prompts, if
    # that is what it adds to the residual stream.
    mlp_outputs: Callable[[], torch.Tensor] | None = None

    def descend(
        self,
        *,
        updates: int,
        after: Descent | None = None,
        among_N: torch.Tensor | None = None,
        start_NO: torch.Tensor | None = None,
        free_NO: torch.Tensor | None = None,
        penalty: Penalty | None = None,
        final_loss: bool = True,
        times_at_top: int | None = None,
    ) -> Descent:
        """Minimises the loss with a new Adam. Every update is projected onto |delta| <= clamp *
        |v|, site by site.

        A request ends after `updates`, or as soon as its loss is below the settings' `stop_loss` or
        not finite.

        Args:
            updates: the largest number of Adam updates. The forward runs once per update, and once
                more for the `final_loss`.
            after: an earlier descent. The divergence is measured from its distribution at
                delta = 0. Without one, this descent must start from zero, and its first
                distribution is used.
            among_N: true for the requests that take part; all if None. The others keep their values
                from `after`.
            start_NO: the start; zero if None.
            free_NO: true for the entries of delta that may change; all if None. The others stay
                zero, and must be zero in the start.
            penalty: a function of delta that is added to the loss.
            final_loss: whether the loss is computed after the last update as well.
            times_at_top: a request ends at its so-many-th loss at which the target is the most
                probable text in every context; the forward must tell the most probable tokens.
        """
        assert after is not None or (start_NO is None and among_N is None), (
            "the divergence is measured from delta = 0"
        )
        assert updates > 0 or final_loss, "at least one update or the final loss"
        settings = self.settings
        state, finished = self._start(after, start_NO, free_NO), []
        ids, forward, step = list(range(len(self.initial_NO))), self.forward, 0
        if among_N is not None and not all(is_among := among_N.tolist()):
            if not any(is_among):
                assert after is not None
                return after
            ids, forward, state, others = _split(ids, forward, state, is_among)
            finished.append(others)
        stop_check = StopCheck(ids, is_delayed=self.is_stop_check_delayed)
        while True:
            with torch.enable_grad():
                delta_KO = state.delta_KO.detach().requires_grad_()
                result = forward(delta_KO, state.before_KV)
                if state.before_KV is None:
                    state = replace(
                        state,
                        before_KC=result.log_p_NC.detach(),
                        before_KV=result.log_p_NV.detach(),
                    )
                loss_K = self._loss(state, delta_KO, result)
                if penalty is not None:
                    loss_K = loss_K + penalty(delta_KO, state.ids_K)
            state = state.with_losses(loss_K, result.log_p_NC, stop_loss=settings.stop_loss)
            if times_at_top is not None:
                state = state.with_top(_is_top(result), times_at_top)
            if settings.is_eased:
                state = self._eased(state, result)
            if step == updates or not any(is_active := stop_check.active(ids, state.is_active_K)):
                break
            # The loss of a request depends on its own delta only.
            (gradient_KO,) = torch.autograd.grad(loss_K.sum(), delta_KO)
            step += 1
            state = state.updated(gradient_KO, step=step, clamp=settings.clamp)
            if step == updates and not final_loss:
                break
            if not all(is_active):
                ids, forward, state, ended = _split(ids, forward, state, is_active)
                finished.append(ended)
        return _descent(merged([*finished, state]), after, among_N)

    def _start(
        self, after: Descent | None, start_NO: torch.Tensor | None, free_NO: torch.Tensor | None
    ) -> DescentState:
        settings, initial_NO, zeros_NO = (
            self.settings,
            self.initial_NO,
            torch.zeros_like(self.initial_NO),
        )
        num_requests, width = initial_NO.shape
        size_NS = by_site(initial_NO, self.num_sites)
        ones_N = torch.ones_like(size_NS[:, 0])
        lr_NS = settings.lr * (
            size_NS / math.sqrt(width // self.num_sites)
            if settings.lr_unit == "relative"
            else torch.ones_like(size_NS)
        )
        return DescentState(
            ids_K=torch.arange(num_requests, device=initial_NO.device),
            size_KS=size_NS,
            lr_KS=lr_NS,
            nll_weight_K=ones_N,
            delta_KO=zeros_NO if start_NO is None else start_NO.detach().clone(),
            first_KO=zeros_NO,
            second_KO=zeros_NO,
            gradients_KO=zeros_NO,
            updates_K=torch.zeros_like(ones_N, dtype=torch.long),
            at_top_K=torch.zeros_like(ones_N, dtype=torch.long),
            loss_K=torch.full_like(ones_N, math.nan) if after is None else after.loss_N,
            is_active_K=torch.ones_like(ones_N, dtype=torch.bool),
            free_KO=free_NO,
            log_p_KC=None if after is None else after.log_p_NC,
            before_KC=None if after is None else after.at_zero[0],
            before_KV=None if after is None else after.at_zero[1],
        )

    def _loss(
        self, state: DescentState, delta_KO: torch.Tensor, result: ForwardResult
    ) -> torch.Tensor:
        # As in the published code, the first norm is not squared. Without v there is no decay.
        decay_KS = by_site(delta_KO, self.num_sites) / torch.where(
            state.size_KS == 0, math.inf, state.size_KS**2
        )
        loss_K: torch.Tensor = (
            -state.nll_weight_K * result.log_p_NC.mean(dim=1)
            + self.settings.kl_factor * result.kl_N
            + self.settings.weight_decay * decay_KS.sum(dim=1)
        )
        return loss_K

    def _eased(self, state: DescentState, result: ForwardResult) -> DescentState:
        """The state with the weight of -log p in the next loss, and without requests whose target
        is most probable and whose divergence is small.
        """
        settings, divergence_K = self.settings, result.kl_N.detach()
        is_top_K = _is_top(result)
        is_active_K = state.is_active_K
        if settings.stop_kl is not None:
            is_active_K = is_active_K & ~(
                is_top_K & (settings.kl_factor * divergence_K <= settings.stop_kl)
            )
        weight_K = torch.ones_like(state.nll_weight_K).masked_fill(is_top_K, settings.easing)
        return replace(state, nll_weight_K=weight_K, is_active_K=is_active_K)


def _is_top(result: ForwardResult) -> torch.Tensor:
    """(K,): whether the target is the most probable text in every context."""
    assert result.top_NC is not None
    return (result.log_p_NC.detach() >= result.top_NC - ROUNDING).all(dim=1)


def _split(
    ids: list[int], forward: Forward, state: DescentState, is_active: Sequence[bool]
) -> tuple[list[int], Forward, DescentState, DescentState]:
    """The active requests with their forward and state, and the state of the others."""
    kept, ended = (
        [place for place, active in enumerate(is_active) if active == expected]
        for expected in (True, False)
    )
    kept_K, ended_K = (torch.tensor(places, device=state.ids_K.device) for places in (kept, ended))
    return (
        [ids[place] for place in kept],
        forward.only(kept),
        state.only(kept_K),
        state.only(ended_K),
    )


def _descent(state: DescentState, after: Descent | None, among_N: torch.Tensor | None) -> Descent:
    assert (
        state.before_KC is not None and state.before_KV is not None and state.log_p_KC is not None
    )
    descent = Descent(
        delta_NO=state.delta_KO,
        loss_N=state.loss_K,
        updates_N=state.updates_K if after is None else after.updates_N + state.updates_K,
        mean_gradient_NO=state.gradients_KO / state.updates_K.clamp(min=1)[:, None],
        at_zero=(state.before_KC, state.before_KV),
        log_p_NC=state.log_p_KC,
    )
    if after is None or among_N is None:
        return descent
    return replace(
        descent,
        delta_NO=torch.where(among_N[:, None], descent.delta_NO, after.delta_NO),
        mean_gradient_NO=torch.where(
            among_N[:, None], descent.mean_gradient_NO, after.mean_gradient_NO
        ),
    )
