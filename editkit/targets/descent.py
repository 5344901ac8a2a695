"""The minimisation behind a target search, in pieces that a restraint on the objective can put together in its own way.

Shape letters: C contexts, O width of the site's output, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.lazy import torch

if TYPE_CHECKING:
    from editkit.targets.search import TargetSettings

# delta_O -> mean log-probability of a target token in each context, (C,), and the log-distribution at the KL position, (V,)
Forward = Callable[["torch.Tensor"], "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Descent:
    """Where a descent ended, and what it saw on its way."""

    delta_O: torch.Tensor
    loss: float  # at delta_O, with the penalty; without `final_loss`, before the last update
    updates: int  # how often Adam moved, in the descents before it as well
    mean_gradient_O: torch.Tensor  # of the loss, over the deltas from which Adam moved in this descent; 0 if it never did
    unmoved: tuple[torch.Tensor, torch.Tensor]  # what the forward gives at delta = 0: log_p_C and log_p_V
    log_p_C: torch.Tensor  # where the loss was taken

    @property
    def nonfinite(self) -> bool:
        return not math.isfinite(self.loss)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TargetProblem:
    """What a search minimises (see `search`); a search is one descent or several of them over the same forward."""

    forward: Forward
    initial_O: torch.Tensor  # v, at least float32
    settings: TargetSettings

    def descend(
        self,
        *,
        updates: int,
        after: Descent | None = None,
        start_O: torch.Tensor | None = None,
        free_O: torch.Tensor | None = None,
        penalty: Callable[[torch.Tensor], torch.Tensor] | None = None,
        final_loss: bool = True,
    ) -> Descent:
        """Moves delta with a new Adam, after each update projected onto |delta| <= clamp * |v|.

        It ends after `updates`, or as soon as the loss is below the settings' `stop_loss` or is no finite number.

        Args:
            updates: how often Adam moves at most; the forward runs once for each, and once more for the `final_loss`.
            after: an earlier descent, whose distribution at delta = 0 is what the divergence is measured from. Without one that is this
                descent's first, so it has to start from zero.
            start_O: where to start; zero if not given.
            free_O: true where delta may move; elsewhere it stays zero, as its start has to be. All of it moves, if not given.
            penalty: of delta, added to the loss.
            final_loss: whether the loss is taken after the last update, too.
        """
        assert after is not None or start_O is None, "the divergence is measured from delta = 0"
        settings, size = self.settings, torch.linalg.vector_norm(self.initial_O).item()
        lr = settings.lr * (size / math.sqrt(len(self.initial_O)) if settings.lr_unit == "relative" else 1.0)
        delta_O = (torch.zeros_like(self.initial_O) if start_O is None else start_O.detach().clone()).requires_grad_()
        # Adam refuses a learning rate that is no number; where |v| is none, neither is the loss, and no step is taken.
        adam = torch.optim.Adam([delta_O], lr=lr if math.isfinite(lr) else 0.0)
        gradients_O = torch.zeros_like(self.initial_O)
        unmoved = None if after is None else after.unmoved
        log_p_C, value, made = torch.empty(0), math.nan, 0
        with torch.enable_grad():
            while made < updates or final_loss:
                log_p_C, log_p_V = self.forward(delta_O)
                if unmoved is None:
                    unmoved = log_p_C.detach(), log_p_V.detach()
                kl = torch.nn.functional.kl_div(unmoved[1], log_p_V, reduction="sum", log_target=True)  # KL(current || first): one prompt
                decay = torch.linalg.vector_norm(delta_O) / size**2 if size else 0.0  # the first is not squared, in the published code
                loss = -log_p_C.mean() + settings.kl_factor * kl + settings.weight_decay * decay
                if penalty is not None:
                    loss = loss + penalty(delta_O)
                value = loss.item()
                if not math.isfinite(value) or value < settings.stop_loss or made == updates:
                    break
                adam.zero_grad()
                loss.backward()
                assert delta_O.grad is not None
                gradients_O += delta_O.grad
                if free_O is not None:
                    delta_O.grad.masked_fill_(~free_O, 0.0)  # with no gradient ever, Adam's step is exactly zero
                adam.step()
                made += 1
                with torch.no_grad():
                    length = torch.linalg.vector_norm(delta_O).item()
                    if length > settings.clamp * size:
                        delta_O.mul_(settings.clamp * size / length)
        assert unmoved is not None, "at least one update or the final loss"
        return Descent(
            delta_O=delta_O.detach(),
            loss=value,
            updates=made if after is None else after.updates + made,
            mean_gradient_O=gradients_O / max(made, 1),
            unmoved=unmoved,
            log_p_C=log_p_C.detach(),
        )
