"""PMET: the targets of attention and MLP are searched together, and the MLP's alone is written (Li
et al. 2023, arXiv 2308.08742).

MEMIT searches a target for the output of a whole block, which the attention and the residual stream
make as well as the MLP. PMET searches two deltas at once, at the outputs of the last edited block's
attention and MLP. The attention's delta is dropped after the search: its weights stay as they are.
With the MLP's target Z, for the layers i = 0 ... L - 1 from below,

    T = Z - z_now                        z: the output of the last edited layer's MLP
    R = T / sqrt(L - i)                  this layer's share; MEMIT's is T / (L - i)
    D = R K^T (lambda C + K K^T)^-1      as in MEMIT; restraints on the solve replace it

Every delta has its own clamp and decay, relative to its own value. The authors' code eases the
search (`target.easing`, `target.stop_kl`): while the target's tokens are the most probable ones in
every context, the next loss has 0.1 of -log p, and the search ends once the divergence is small. So
does editkit; it was not checked against the paper's formula.

Variants: `deltas: mlp` searches the MLP's delta alone; `spread: even` is MEMIT's share. Both are
ablations of the paper.

T is measured again before each layer, and the last one writes all of it, as in MEMIT. The layers
before it write larger shares than MEMIT's: of five the first writes 0.45 T, not 0.2 T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.spread import AbstractSpread, SpreadPlan
from editkit.restraints.base import Place
from editkit.targets.self_check import require_outputs

if TYPE_CHECKING:
    from editkit.editors.base import Step
    from editkit.linalg.lowrank import Update
    from editkit.model.editable import EditableModel
    from editkit.model.shortcuts import Comparison
    from editkit.targets.forwards import Sites
    from editkit.types import EditRequest

POWERS = {"square_root": 0.5, "even": 1.0}


@dataclass(frozen=True, kw_only=True)
class Pmet(AbstractSpread):
    """Precise model editing in a transformer. `conf/editor/pmet.yaml` documents the options.

    Raises:
        OptionError: an option is out of range.
    """

    # EAC would choose anchors among the coordinates of two targets, of which one is dropped.
    places: ClassVar[frozenset[Place]] = frozenset({"solve", "update", "total"})

    deltas: Literal["both", "mlp"]
    spread: Literal["square_root", "even"]

    def site(self, model: EditableModel) -> Sites:
        layer = self.layers[-1]
        mlp = model.family.mlp(layer)
        return mlp if self.deltas == "mlp" else (model.family.attention(layer), mlp)

    def self_check(self, model: EditableModel, request: EditRequest) -> list[Comparison]:
        require_outputs(model, request, self.value_at(model), self.modules(model)[-1])
        return super().self_check(model, request)

    def propose(self, step: Step, module: str, plan: SpreadPlan) -> Update:
        return step.solve(self.problem(step, module, plan, power=POWERS[self.spread]))
