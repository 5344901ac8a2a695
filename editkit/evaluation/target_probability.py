"""The probability of each edit's target: right after its own edit, and after later edits.

D4S (Huang et al. 2024, arXiv 2410.23843, Figure 5a) records it over 1,000 edits and reads off how
many edits a method can make. P is the length-normalised probability of the protocol `probability`,
exp(mean log-prob of the target's tokens), after the edit's own prompt. Nothing is averaged here.
The numbers are written to the run's samples, for `editkit report`.

Shape letters: N requests so far.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from editkit.errors import OptionError, message
from editkit.evaluation.base import AbstractEditSamples, Moment, Samples
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.lazy import torch
from editkit.model.editable import EditableModel
from editkit.types import EditRequest, Measurement

SAMPLES = "target_probability"
AFTER_EDIT = "after_edit"  # key of a view's probabilities right after each edit: (N,)


@dataclass(frozen=True, kw_only=True)
class TargetProbability(AbstractEditSamples):
    """It takes the place of a suite. Without `immediate` in `evaluation.timings`, the probabilities
    right after an edit are unknown.
    """

    name: str
    tokens_per_batch: int
    every: int

    def __post_init__(self) -> None:
        problems = [
            message(key, "out of range", got=value, expected="at least 1")
            for key, value in (("tokens_per_batch", self.tokens_per_batch), ("every", self.every))
            if value < 1
        ]
        if problems:
            raise OptionError(problems)

    def measure(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> list[Measurement | Samples]:
        if moment.is_before or not requests:
            return []
        noted_N = notes.get(f"{AFTER_EDIT}/{moment.view}")
        after_edit = [] if noted_N is None else noted_N.tolist()
        rows = tuple(
            {
                "request": request.id,
                "position": position,
                "after_edit": _number(after_edit[position - 1])
                if position <= len(after_edit)
                else None,
                "now": _number(now),
            }
            for request, position, now in zip(
                requests, moment.positions, self._probabilities(model, requests), strict=True
            )
        )
        return [Samples(name=SAMPLES, rows=rows)]

    def note(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> Mapping[str, torch.Tensor]:
        key = f"{AFTER_EDIT}/{moment.view}"
        new_N = torch.tensor(self._probabilities(model, requests), dtype=torch.float64)
        return {**notes, key: torch.cat([notes[key], new_N]) if key in notes else new_N}

    def _probabilities(self, model: EditableModel, requests: Sequence[EditRequest]) -> list[float]:
        """P(target) of each request; nan where it is not finite."""
        probes = [request.probe() for request in requests]
        scores = score(model, probes, tokens_per_batch=self.tokens_per_batch)
        return [
            scores[probe].probability if scores[probe].is_finite else math.nan for probe in probes
        ]


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
