"""How a descent moves, and how it learns that requests are done without making the device wait.

Shape letters: N requests, K those of them that still go on, O width of the site's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from editkit.lazy import torch

DECAYS, EPSILON = (0.9, 0.999), 1e-8  # torch's defaults for Adam, which published code takes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Going:
    """The requests that still go on, and those that ended so lately that nobody has looked: theirs
    is frozen by `is_going_K`.
    """

    ids_K: torch.Tensor  # which of the N
    size_K: torch.Tensor  # |v|
    lr_K: torch.Tensor
    delta_KO: torch.Tensor
    first_KO: torch.Tensor  # Adam's moments
    second_KO: torch.Tensor
    gradients_KO: torch.Tensor  # summed
    updates_K: torch.Tensor
    loss_K: torch.Tensor  # where it was taken last
    is_going_K: torch.Tensor
    free_KO: torch.Tensor | None
    log_p_KC: torch.Tensor | None = None  # there, too
    before_KC: torch.Tensor | None = None  # what the forward gives at delta = 0
    before_KV: torch.Tensor | None = None

    def noted(self, loss_K: torch.Tensor, log_p_KC: torch.Tensor, *, stop_loss: float) -> Going:
        """With what the forward gave, for those that had not ended before; it ends those whose loss
        is low enough, or no finite number.
        """
        loss_K, log_p_KC = loss_K.detach(), log_p_KC.detach()
        known_KC = log_p_KC if self.log_p_KC is None else self.log_p_KC
        return replace(
            self,
            loss_K=torch.where(self.is_going_K, loss_K, self.loss_K),
            log_p_KC=torch.where(self.is_going_K[:, None], log_p_KC, known_KC),
            is_going_K=self.is_going_K & loss_K.isfinite() & (loss_K >= stop_loss),
        )

    def moved(self, gradient_KO: torch.Tensor, *, step: int, clamp: float) -> Going:
        """After one update of Adam, projected onto |delta| <= clamp * |v|. `step` counts from 1."""
        is_going_K1 = self.is_going_K[:, None]
        gradients_KO = self.gradients_KO + torch.where(is_going_K1, gradient_KO, 0.0)
        if self.free_KO is not None:
            gradient_KO = gradient_KO.masked_fill(
                ~self.free_KO, 0.0
            )  # with no gradient ever, Adam's step is exactly zero
        first_KO = self.first_KO.lerp(gradient_KO, 1 - DECAYS[0])
        second_KO = torch.addcmul(
            self.second_KO * DECAYS[1], gradient_KO, gradient_KO, value=1 - DECAYS[1]
        )
        shrunk, root = 1 - DECAYS[0] ** step, (1 - DECAYS[1] ** step) ** 0.5
        delta_KO = self.delta_KO - (self.lr_K / shrunk)[:, None] * first_KO / (
            second_KO.sqrt() / root + EPSILON
        )
        length_K, limit_K = torch.linalg.vector_norm(delta_KO, dim=1), clamp * self.size_K
        delta_KO = delta_KO * torch.where(length_K > limit_K, limit_K / length_K, 1.0)[:, None]
        return replace(
            self,
            delta_KO=torch.where(is_going_K1, delta_KO, self.delta_KO),
            first_KO=first_KO,
            second_KO=second_KO,
            gradients_KO=gradients_KO,
            updates_K=self.updates_K + self.is_going_K,
        )

    def only(self, kept_K: torch.Tensor) -> Going:
        """Of some of them."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        kept: dict[str, Any] = {
            name: None if each is None else each[kept_K] for name, each in values.items()
        }
        return Going(**kept)


def together(parts: list[Going]) -> Going:
    """All requests again, in their order."""
    order_N = torch.cat([part.ids_K for part in parts]).argsort()
    values: dict[str, Any] = {
        field.name: [getattr(part, field.name) for part in parts] for field in fields(Going)
    }
    joined: dict[str, Any] = {
        name: None if each[0] is None else torch.cat(each)[order_N] for name, each in values.items()
    }
    return Going(**joined)


class Lookout:
    """Tells which requests go on.

    Late, it tells what was so one step before: on a GPU, asking for the present would wait for the
    step at hand. A step is then computed in vain for requests that have ended, at most one each;
    nothing of it is kept.
    """

    def __init__(self, ids: Sequence[int], *, is_late: bool) -> None:
        self._is_late = is_late
        self._goes_on = dict.fromkeys(ids, True)
        self._asked: tuple[Sequence[int], torch.Tensor, Any] | None = None

    def look(self, ids: Sequence[int], is_going_K: torch.Tensor) -> list[bool]:
        """For each of these requests, whether it goes on as far as is known; `is_going_K` is how
        they stand now.
        """
        if not self._is_late:
            return is_going_K.tolist()
        if self._asked is not None:
            before, answers_K, event = self._asked
            if event is not None:
                event.synchronize()  # of the step before, which is over or nearly so
            self._goes_on |= zip(before, answers_K.tolist(), strict=True)
        event = torch.cuda.Event() if is_going_K.device.type == "cuda" else None
        self._asked = tuple(ids), is_going_K.to("cpu", non_blocking=True), event
        if event is not None:
            event.record()
        return [self._goes_on[each] for each in ids]
