"""What the editors share that spread a batch of facts over the down projections of several layers:
MEMIT, EMMET and PMET.

For every request a target z is searched at the output of the last edited block (PMET: of its MLP),
at the subject's last token, once a batch. Then each layer is written in turn, from below, on the
weights with the updates of the layers before it.

Contexts: paper and authors' code average over kinds of context, and the bare prompt is a kind of
its own. With five sampled texts the clean key has weight 1/2 and each other key 1/10. Differs from
the authors' code: their five texts begin with "The", "Therefore", "Because", "I" and "You"; ours
are sampled from the model's start token, with a seed.

Shape letters: O d_out, I d_in, N requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.editors.base import Plan, Step
from editkit.editors.locate_then_edit import AbstractLocateThenEdit, nonfinite_of, summary_of
from editkit.errors import message
from editkit.lazy import torch
from editkit.resources.stopwatch import measured
from editkit.stats.least_squares import LeastSquares
from editkit.targets.forwards import modules_of
from editkit.targets.keys import Text, average_keys, clean_outputs, layerwise, subject_texts
from editkit.targets.self_check import compare_keys
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.model.layerwise import LayerwiseForward
    from editkit.model.shortcuts import Comparison


@dataclass(frozen=True, kw_only=True)
class SpreadPlan(Plan):
    """The targets of a batch, and the texts in which its keys are measured."""

    targets_ON: torch.Tensor  # z, float32
    residuals_ON: torch.Tensor  # T before the first layer: the delta of the search
    texts: tuple[tuple[Text, ...], ...]  # by request, then by context, the bare prompt first
    forward: LayerwiseForward  # the forward passes over all these texts, layer by layer


@dataclass(frozen=True, kw_only=True)
class AbstractSpread(AbstractLocateThenEdit[SpreadPlan]):
    """Writes a batch into one layer after the other.

    Raises:
        OptionError: an option is out of range.
    """

    covariance_weight: float  # of C, published as mom2_update_weight

    def problems(self) -> list[str]:
        problems = super().problems()
        if not self.covariance_weight > 0:
            problems.append(
                message("covariance_weight", "must be positive", got=self.covariance_weight)
            )
        if any(texts < 1 for _, texts in self.context_lengths):
            pairs = [list(pair) for pair in self.context_lengths]
            problems.append(message("context_lengths", "a kind without texts", got=pairs))
        return problems

    @property
    def needs_moments(self) -> bool:
        return True

    def value_at(self, model: EditableModel) -> str:
        """The module whose output becomes z: the last of the sites."""
        return modules_of(self.site(model))[-1]

    def self_check(self, model: EditableModel, request: EditRequest) -> list[Comparison]:
        keys = compare_keys(model, request, self.layers, self.value_at(model))
        return [*super().self_check(model, request), keys]

    def plan(self, step: Step) -> SpreadPlan:
        """Searches z for every request on the weights from before the batch."""
        targets = self.search(step)
        num_sites = len(modules_of(self.site(step.model)))
        texts = tuple(
            subject_texts(step.model, request, step.contexts) for request in step.requests
        )
        return SpreadPlan(
            summary=summary_of(targets),
            nonfinite=nonfinite_of(targets),
            targets_ON=_last_parts([target.vector_O for target in targets], num_sites),
            residuals_ON=_last_parts([target.delta_O for target in targets], num_sites),
            texts=texts,
            forward=layerwise(step.model, texts),
        )

    def problem(
        self,
        step: Step,
        module: str,
        plan: SpreadPlan,
        *,
        measured_once: bool = False,
        power: float = 1.0,
    ) -> LeastSquares:
        """The keys of a layer, and its share T / (L - i)^power of the residual T, as it is now or,
        with `measured_once`, as it was before the first layer.
        """
        index = self.modules(step.model).index(module)
        with measured("keys"):
            keys_IN = average_keys(plan.forward, self.layers[index], self.context_weights)
        missing_ON = plan.residuals_ON  # before the first layer nothing was written yet
        if index > 0 and not measured_once:
            with measured("residual"):
                last, num_contexts = self.layers[-1], len(plan.texts[0])
                value_at = self.value_at(step.model)
                now_ON = clean_outputs(plan.forward, last, num_contexts, value_at)
                missing_ON = plan.targets_ON - now_ON
        return LeastSquares(
            module=module,
            keys_IN=keys_IN,
            residuals_ON=missing_ON / (len(self.layers) - index) ** power,
            weight=self.covariance_weight,
        )

    @property
    def context_weights(self) -> tuple[float, ...]:
        """The weight of each context in the mean: kinds weigh the same, texts of a kind too."""
        kinds = [1, *(texts for _, texts in self.context_lengths)]
        return tuple(1 / len(kinds) / texts for texts in kinds for _ in range(texts))


def _last_parts(vectors: Sequence[torch.Tensor], num_sites: int) -> torch.Tensor:
    """The last site's part of each vector, (O, N)."""
    return torch.stack([vector_O.chunk(num_sites)[-1] for vector_O in vectors], dim=1)
