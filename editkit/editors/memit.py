"""MEMIT: many facts in one batch, written into the down projections of several layers (Meng et
al. 2023, arXiv 2210.07229).

For the layers i = 0 ... L - 1 from below, each on the weights with the updates of the layers before
it, with the target z of each request from `editkit.editors.spread`,

    T = Z - z_now                        the residual, measured on the clean prompts
    R = T / (L - i)                      this layer's share
    K = keys of the subject's last token, averaged over contexts
    D = R K^T (lambda C + K K^T)^-1      Algorithm 1 and Eq. 14; restraints on the solve replace it

`spread: published_code` is D4S's: its code measures T once, before the first layer, and divides by
L - i nevertheless. Five layers then write 1/5 + 1/4 + 1/3 + 1/2 + 1 = 2.28 T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.spread import AbstractSpread, SpreadPlan
from editkit.restraints.base import Place

if TYPE_CHECKING:
    from editkit.editors.base import Step
    from editkit.linalg.lowrank import Update
    from editkit.model.editable import EditableModel


@dataclass(frozen=True, kw_only=True)
class Memit(AbstractSpread):
    """Mass-editing memory in a transformer. The options are documented in `conf/editor/memit.yaml`.

    Raises:
        OptionError: an option is out of range.
    """

    places: ClassVar[frozenset[Place]] = frozenset({"objective", "solve", "update", "total"})

    spread: Literal["recomputed", "published_code"]

    def site(self, model: EditableModel) -> str:
        return model.family.block(self.layers[-1])

    def propose(self, step: Step, module: str, plan: SpreadPlan) -> Update:
        is_once = self.spread == "published_code"
        return step.solve(self.problem(step, module, plan, measured_once=is_once))
