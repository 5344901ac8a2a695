"""ROME: one fact, one rank-one update of one MLP's down projection (Meng et al. 2022, arXiv
2202.05262).

    W_new = W + (v* - W k_out) u^T / (k_den . u)        u = C^-1 k_u, the paper's Eq. 2 with the factor left to the quotient

where C = E[k k^T]. The variants differ in which key stands where: k_0 is the key of the clean
prompt, kbar the mean over all contexts.

    keys       k_u    k_out, k_den    what holds afterwards
    averaged   kbar   kbar            W_new kbar = v*    r-ROME (Gupta et al. 2024, arXiv 2403.07175); repairs ROME's sudden collapses
    original   kbar   k_0             W_new k_0 = v*     the authors' code; k_0 . u may be small, and then the update explodes
    clean      k_0    k_0             W_new k_0 = v*     p-ROME (the same paper)

With a bias b (GPT-2, GPT-J) read W k + b for W k: outputs are captured, not computed, so the
equations hold for what the module gives.

Shape letters: O d_out, I d_in, C contexts, N = 1 edit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from editkit.editors.base import AbstractEditor, Plan, Solve
from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.linalg.lowrank import LowRank
from editkit.model.contexts import sample_contexts
from editkit.resources.stopwatch import measured
from editkit.restraints.base import Place
from editkit.targets.keys import keys_and_outputs
from editkit.targets.search import Target, search_target
from editkit.targets.settings import TargetSettings
from editkit.types import EditRequest, TensorState

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.stats.store import Moments
    from editkit.targets.objective import Objective


@dataclass(frozen=True, kw_only=True)
class RomePlan(Plan):
    """The target vector of the one request, and the contexts it was found in."""

    target: Target
    contexts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rome(AbstractEditor):
    """Rank-one model editing; its options are those of `conf/editor/rome.yaml`."""

    places: ClassVar[frozenset[Place]] = frozenset({"objective", "update", "total"})
    max_batch_size: ClassVar[int | None] = 1
    spans_devices: ClassVar[bool] = True

    name: str
    layers: tuple[int, ...]  # one
    keys: Literal["averaged", "original", "clean"]
    covariance: bool | None  # None as False: u = k, no statistics are wanted
    context_lengths: tuple[tuple[int, int], ...]  # (tokens, how many texts)
    target: TargetSettings

    def __post_init__(self) -> None:
        problems = []
        if len(self.layers) != 1:
            problems.append(f"editor.layers: ROME edits one layer - got {list(self.layers)}.")
        if any(tokens < 2 or texts < 0 for tokens, texts in self.context_lengths):
            problems.append(
                f"editor.context_lengths: pairs [tokens, texts], at least 2 tokens - got {list(self.context_lengths)}."
            )
        if problems:
            raise ConfigError(problems)

    @property
    def needs_moments(self) -> bool:
        return bool(self.covariance)

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        return model.down_projections(self.layers)

    def moment_modules(self, model: EditableModel) -> tuple[str, ...]:
        return self.modules(model) if self.covariance else ()

    def contexts(self, model: EditableModel, generator: torch.Generator) -> tuple[str, ...]:
        return sample_contexts(model, lengths=self.context_lengths, generator=generator)

    def init(self, model: EditableModel, moments: Moments) -> TensorState:
        """ROME remembers nothing. A covariance that cannot be inverted is found here, before the
        first edit.
        """
        for module in self.moment_modules(model):
            moments.factorise(module)
        return {}

    def plan(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        contexts: Sequence[str],
        state: TensorState,
        objective: Objective | None,
    ) -> RomePlan:
        """Searches v* at the MLP's output. Raises ConfigError for more than one request."""
        request = _only(requests)
        site = model.family.mlp(self.layers[0])
        target = search_target(
            model, request, site=site, contexts=contexts, settings=self.target, objective=objective
        )
        summary = {
            "probability_before": target.probability_before,
            "probability_after": target.probability_after,
            "steps": target.updates,
            "loss": target.loss,
        }
        return RomePlan(
            summary=summary,
            nonfinite="loss" if target.nonfinite else None,
            target=target,
            contexts=tuple(contexts),
        )

    def propose(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        module: str,
        plan: Plan,
        state: TensorState,
        moments: Moments,
        solve: Solve,
    ) -> LowRank:
        assert isinstance(plan, RomePlan)
        contexts = plan.contexts[:1] if self.keys == "clean" else plan.contexts
        with measured("keys"):
            keys_CI, outputs_CO = keys_and_outputs(
                model, _only(requests), module=module, contexts=contexts
            )
        key_I = keys_CI.mean(dim=0)
        direction_I = (
            moments.inverse_times(module, key_I[:, None])[:, 0] if self.covariance else key_I
        )
        direction_I = direction_I / torch.linalg.vector_norm(direction_I)
        # The first context is the bare prompt.
        current_O, norming_I = (
            (outputs_CO.mean(dim=0), key_I)
            if self.keys == "averaged"
            else (outputs_CO[0], keys_CI[0])
        )
        # v* was searched from the clean prompt's output, so with averaged keys the residual is
        # delta + W k_0 - W kbar, as in r-ROME's code.
        left_O = (plan.target.vector_O.double() - current_O) / (norming_I @ direction_I)
        return LowRank(left_O[:, None].float(), direction_I[:, None].float())

    def observe(
        self, model: EditableModel, requests: Sequence[EditRequest], state: TensorState
    ) -> TensorState:
        return state


def _only(requests: Sequence[EditRequest]) -> EditRequest:
    if len(requests) != 1:
        raise ConfigError(
            f"batch_size: ROME edits one fact at a time - got {len(requests)} requests in a batch - set batch_size=1."
        )
    return requests[0]
