"""ROME: one fact, one rank-one update of one MLP's down projection (Meng et al. 2022,
arXiv 2202.05262).

    W_new = W + (v* - W k_out) u^T / (k_den . u)        u = C^-1 k_u (Eq. 2)

C = E[k k^T] is the second moment of the keys. The variants use different keys: k_0 is the key of
the clean prompt, kbar the mean over all contexts.

    keys       k_u    k_out, k_den    property
    averaged   kbar   kbar            W_new kbar = v*    r-ROME (Gupta et al. 2024, 2403.07175)
    original   kbar   k_0             W_new k_0 = v*     the authors' code
    clean      k_0    k_0             W_new k_0 = v*     p-ROME (Gupta et al. 2024)

With `original`, k_0 . u may be small, and the update is then large: ROME's sudden collapses come
from there. With a bias b (GPT-2, GPT-J) read W k + b for W k: outputs are captured, not computed.

Shape letters: O d_out, I d_in, C contexts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.base import Plan, Step
from editkit.editors.locate_then_edit import AbstractLocateThenEdit, nonfinite_of, summary_of
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.resources.stopwatch import measured
from editkit.restraints.base import Place
from editkit.targets.keys import keys_and_outputs
from editkit.targets.search import Target
from editkit.targets.self_check import require_outputs
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.model.shortcuts import Comparison
    from editkit.stats.store import Moments
    from editkit.types import TensorState


@dataclass(frozen=True, kw_only=True)
class RomePlan(Plan):
    """The target vector v* of the request, at the MLP's output."""

    target: Target


@dataclass(frozen=True, kw_only=True)
class Rome(AbstractLocateThenEdit[RomePlan]):
    """Rank-one model editing. The options are documented in `conf/editor/rome.yaml`."""

    places: ClassVar[frozenset[Place]] = frozenset({"objective", "update", "total"})
    max_batch_size: ClassVar[int | None] = 1
    max_layers: ClassVar[int | None] = 1

    keys: Literal["averaged", "original", "clean"]
    covariance: bool | None  # None or False: u = k, without second moments

    @property
    def needs_moments(self) -> bool:
        return bool(self.covariance)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """No state. Raises ConfigError for a second moment that cannot be inverted."""
        for module in self.moment_modules(model):
            moments.factorise(module)
        return {}

    def site(self, model: EditableModel) -> str:
        return model.family.mlp(self.layers[0])

    def self_check(self, model: EditableModel, request: EditRequest) -> list[Comparison]:
        require_outputs(model, request, self.site(model), self.modules(model)[0])
        return super().self_check(model, request)

    def plan(self, step: Step) -> RomePlan:
        targets = self.search(step)
        summary = summary_of(targets) | {"steps": targets[0].updates}  # a whole number, no mean
        return RomePlan(summary=summary, nonfinite=nonfinite_of(targets), target=targets[0])

    def propose(self, step: Step, module: str, plan: RomePlan) -> LowRank:
        contexts = step.contexts[:1] if self.keys == "clean" else step.contexts
        with measured("keys"):
            keys_CI, outputs_CO = keys_and_outputs(
                step.model, step.request, module=module, contexts=contexts
            )
        key_I, output_O = keys_CI.mean(dim=0), outputs_CO.mean(dim=0)
        direction_I = key_I
        if self.covariance:
            direction_I = step.moments.inverse_times(module, key_I[:, None])[:, 0]
        direction_I = direction_I / torch.linalg.vector_norm(direction_I)
        if self.keys != "averaged":
            key_I, output_O = keys_CI[0], outputs_CO[0]  # of the bare prompt, which comes first
        # The search starts from the clean prompt's output W k_0. With averaged keys the residual
        # is therefore delta + W k_0 - W kbar, as in r-ROME's code.
        left_O = (plan.target.vector_O.double() - output_O) / (key_I @ direction_I)
        return LowRank(left_O[:, None].float(), direction_I[:, None].float())
