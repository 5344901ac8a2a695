"""What the locate-then-edit methods share: layers, sampled contexts, a search for target vectors.

Shape letters: N requests, O width of the site's output.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from editkit.editors.base import AbstractEditor, PlanT, Step
from editkit.errors import OptionError, message
from editkit.model.contexts import sample_contexts
from editkit.model.tokens import PLACE
from editkit.resources.workload import EditorMemory, Workload
from editkit.targets.forwards import Sites
from editkit.targets.keys import subject_texts
from editkit.targets.search import Target, search_targets
from editkit.targets.self_check import compare_search
from editkit.targets.settings import TargetSettings
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.lazy import torch
    from editkit.model.editable import EditableModel
    from editkit.model.shortcuts import Comparison


@dataclass(frozen=True, kw_only=True)
class AbstractLocateThenEdit(AbstractEditor[PlanT]):
    """Edits the down projections of some layers so that the model's value at the subject's last
    token becomes a target vector.

    Raises:
        OptionError: an option is out of range.
    """

    spans_devices: ClassVar[bool] = True
    max_layers: ClassVar[int | None] = None

    name: str
    layers: tuple[int, ...]  # ascending
    context_lengths: tuple[tuple[int, int], ...]  # (tokens, number of texts), each pair a kind
    target: TargetSettings

    def __post_init__(self) -> None:
        if problems := self.problems():
            raise OptionError(problems)

    def problems(self) -> list[str]:
        """Options out of range. Editors with more options extend it."""
        problems = []
        given, limit = self.layers, self.max_layers
        is_ascending = all(before < after for before, after in itertools.pairwise(given))
        if not given or not is_ascending or len(given) > (limit or len(given)):
            expected = "one layer" if limit == 1 else "at least one layer, in ascending order"
            problems.append(
                message("layers", "unusable layers", got=list(given), expected=expected)
            )
        if any(tokens < 2 or texts < 0 for tokens, texts in self.context_lengths):
            problems.append(
                message(
                    "context_lengths",
                    "unusable pairs",
                    got=[list(pair) for pair in self.context_lengths],
                    expected="[tokens, texts] with at least 2 tokens, the start token included",
                )
            )
        return problems

    @property
    @abc.abstractmethod
    def needs_moments(self) -> bool:
        """Whether the least squares are weighted by second moments of keys."""

    def modules(self, model: EditableModel) -> tuple[str, ...]:
        return model.down_projections(self.layers)

    def contexts(self, model: EditableModel, generator: torch.Generator) -> tuple[str, ...]:
        return sample_contexts(model, lengths=self.context_lengths, generator=generator)

    def edited_tokens(
        self, model: EditableModel, request: EditRequest
    ) -> tuple[Sequence[int], Sequence[int]]:
        [text] = subject_texts(model, request, (PLACE,))
        return text, (len(text) - 1,)

    @abc.abstractmethod
    def site(self, model: EditableModel) -> Sites:
        """The module whose output a target vector is searched for, or several of one block."""

    def self_check(self, model: EditableModel, request: EditRequest) -> list[Comparison]:
        if self.target.exact:
            return []
        site, products = self.site(model), self.target.products
        return compare_search(model, request, site, products=products)

    def memory(self, work: Workload) -> EditorMemory:
        return EditorMemory(
            working=self.target.working_bytes(work, context_lengths=self.context_lengths),
            saving="a lower editor.target.tokens_at_once or batch_size",
        )

    def search(self, step: Step) -> tuple[Target, ...]:
        """The target vector of each request at the output of the site."""
        requests = (step.request,) if self.max_batch_size == 1 else step.requests
        return search_targets(
            step.model,
            requests,
            site=self.site(step.model),
            contexts=step.contexts,
            settings=self.target,
            objective=step.objective,
        )


def summary_of(targets: Sequence[Target]) -> dict[str, float]:
    """The means over a batch that a step record holds."""
    names = {
        "probability_before": "probability_before",
        "probability_after": "probability_after",
        "steps": "updates",
        "loss": "loss",
    }
    return {
        name: sum(getattr(target, field) for target in targets) / len(targets)
        for name, field in names.items()
    }


def nonfinite_of(targets: Sequence[Target]) -> str | None:
    return "loss" if any(target.nonfinite for target in targets) else None
