"""The minimisation behind a target search, in pieces that a restraint on the objective can put
together in its own way.

All requests of a batch are minimised together, each for itself: its own first distribution,
learning rate, clamp and end. One that has ended is frozen where it stopped and leaves the batch.

Shape letters: N requests, K those of them that still go on, C contexts, O width of the site's
output, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from editkit.lazy import torch
from editkit.targets.stepping import Going, Lookout, together

if TYPE_CHECKING:
    from editkit.targets.settings import TargetSettings

# deltas (K, O) of the requests with these indices (K,) -> what to add to each one's loss, (K,)
Penalty = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


class Seen(NamedTuple):
    """What the network says of some deltas; gradients flow through the first two."""

    log_p_NC: torch.Tensor  # mean log-probability of a target's token, in each context
    kl_N: (
        torch.Tensor
    )  # KL(now || before) of the distribution at the KL position; 0 where nothing was before
    log_p_NV: torch.Tensor  # that distribution


class Forward(Protocol):
    """The network's part."""

    def __call__(self, delta_NO: torch.Tensor, before_NV: torch.Tensor | None) -> Seen:
        """What it says; `before_NV` is the log-distribution that the divergence is measured
        from.
        """

    def only(self, kept: Sequence[int]) -> Forward:
        """The same for some of the requests, by their places among those of this one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Descent:
    """Where a descent ended, and what it saw on its way; of every request."""

    delta_NO: torch.Tensor
    loss_N: torch.Tensor  # at delta, with the penalty; without `final_loss`, before the last update
    updates_N: torch.Tensor  # how often Adam moved, in the descents before it as well
    mean_gradient_NO: (
        torch.Tensor
    )  # of the loss, over the deltas from which Adam moved in this descent; 0 if it never did
    unmoved: tuple[
        torch.Tensor, torch.Tensor
    ]  # what the forward gives at delta = 0: log_p_NC and log_p_NV
    log_p_NC: torch.Tensor  # where the loss was taken

    @property
    def is_finite_N(self) -> torch.Tensor:
        """Whether the loss is a finite number; if not, the descent ended there."""
        return self.loss_N.isfinite()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TargetProblem:
    """What a search minimises (see `search`); a search is one descent or several of them over the
    same forward.
    """

    forward: Forward
    initial_NO: torch.Tensor  # v, at least float32
    settings: TargetSettings
    # who has ended is asked for a step late, see `Lookout`; the result has the same bits
    is_late: bool = False

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
    ) -> Descent:
        """Moves each delta with a new Adam, after each update projected onto |delta| <= clamp *
        |v|.

        A request ends after `updates`, or as soon as its loss is below the settings' `stop_loss` or
        is no finite number.

        Args:
            updates: how often Adam moves at most; the forward runs once for each, and once more for
            the `final_loss`. after: an earlier descent, whose distribution at delta = 0 is what the
            divergence is measured from. Without one that is this
                descent's first, so it has to start from zero.
            among_N: true for the requests that take part; the others keep what they have in
            `after`. All do, if not given. start_NO: where to start; zero if not given. free_NO:
            true where delta may move; elsewhere it stays zero, as its start has to be. All of it
            moves, if not given. penalty: of delta, added to the loss. final_loss: whether the loss
            is taken after the last update, too.
        """
        assert after is not None or (start_NO is None and among_N is None), (
            "the divergence is measured from delta = 0"
        )
        assert updates > 0 or final_loss, "at least one update or the final loss"
        settings = self.settings
        going, left = self._start(after, start_NO, free_NO), []
        ids, forward, made = list(range(len(self.initial_NO))), self.forward, 0
        if among_N is not None and not all(is_among := among_N.tolist()):
            if not any(is_among):
                assert after is not None
                return after
            ids, forward, going, rest = _divided(ids, forward, going, is_among)
            left.append(rest)
        lookout = Lookout(ids, is_late=self.is_late)
        while True:
            with torch.enable_grad():
                delta_KO = going.delta_KO.detach().requires_grad_()
                seen = forward(delta_KO, going.before_KV)
                if going.before_KV is None:
                    going = replace(
                        going, before_KC=seen.log_p_NC.detach(), before_KV=seen.log_p_NV.detach()
                    )
                loss_K = self._loss(going, delta_KO, seen)
                if penalty is not None:
                    loss_K = loss_K + penalty(delta_KO, going.ids_K)
            going = going.noted(loss_K, seen.log_p_NC, stop_loss=settings.stop_loss)
            if made == updates or not any(goes_on := lookout.look(ids, going.is_going_K)):
                break
            (gradient_KO,) = torch.autograd.grad(
                loss_K.sum(), delta_KO
            )  # each one's delta is in its own loss alone
            made += 1
            going = going.moved(gradient_KO, step=made, clamp=settings.clamp)
            if made == updates and not final_loss:
                break
            if not all(goes_on):
                ids, forward, going, ended = _divided(ids, forward, going, goes_on)
                left.append(ended)
        return _descent(together([*left, going]), after, among_N)

    def _start(
        self, after: Descent | None, start_NO: torch.Tensor | None, free_NO: torch.Tensor | None
    ) -> Going:
        settings, initial_NO, zeros_NO = (
            self.settings,
            self.initial_NO,
            torch.zeros_like(self.initial_NO),
        )
        num_requests, width = initial_NO.shape
        size_N = torch.linalg.vector_norm(initial_NO, dim=1)
        lr_N = settings.lr * (
            size_N / math.sqrt(width) if settings.lr_unit == "relative" else torch.ones_like(size_N)
        )
        return Going(
            ids_K=torch.arange(num_requests, device=initial_NO.device),
            size_K=size_N,
            lr_K=lr_N,
            delta_KO=zeros_NO if start_NO is None else start_NO.detach().clone(),
            first_KO=zeros_NO,
            second_KO=zeros_NO,
            gradients_KO=zeros_NO,
            updates_K=torch.zeros_like(size_N, dtype=torch.long),
            loss_K=torch.full_like(size_N, math.nan) if after is None else after.loss_N,
            is_going_K=torch.ones_like(size_N, dtype=torch.bool),
            free_KO=free_NO,
            log_p_KC=None if after is None else after.log_p_NC,
            before_KC=None if after is None else after.unmoved[0],
            before_KV=None if after is None else after.unmoved[1],
        )

    def _loss(self, going: Going, delta_KO: torch.Tensor, seen: Seen) -> torch.Tensor:
        # The first is not squared, in the published code. Where v is zero there is nothing to
        # measure by.
        decay_K = torch.linalg.vector_norm(delta_KO, dim=1) / torch.where(
            going.size_K == 0, math.inf, going.size_K**2
        )
        result: torch.Tensor = (
            -seen.log_p_NC.mean(dim=1)
            + self.settings.kl_factor * seen.kl_N
            + self.settings.weight_decay * decay_K
        )
        return result


def _divided(
    ids: list[int], forward: Forward, going: Going, goes_on: Sequence[bool]
) -> tuple[list[int], Forward, Going, Going]:
    """Those that go on, and those that do not."""
    kept, ended = (
        [place for place, each in enumerate(goes_on) if each == wanted] for wanted in (True, False)
    )
    kept_K, ended_K = (torch.tensor(places, device=going.ids_K.device) for places in (kept, ended))
    return (
        [ids[place] for place in kept],
        forward.only(kept),
        going.only(kept_K),
        going.only(ended_K),
    )


def _descent(found: Going, after: Descent | None, among_N: torch.Tensor | None) -> Descent:
    assert (
        found.before_KC is not None and found.before_KV is not None and found.log_p_KC is not None
    )
    descent = Descent(
        delta_NO=found.delta_KO,
        loss_N=found.loss_K,
        updates_N=found.updates_K if after is None else after.updates_N + found.updates_K,
        mean_gradient_NO=found.gradients_KO / found.updates_K.clamp(min=1)[:, None],
        unmoved=(found.before_KC, found.before_KV),
        log_p_NC=found.log_p_KC,
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
