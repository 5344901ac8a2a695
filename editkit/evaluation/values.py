"""The values of edited facts: the output of an edited matrix at the subject's last token, right
after the edit and after later edits.

PRUNE (Ma et al. 2024, arXiv 2405.16821, Figure 5) shows the first 100 of them on their two
principal components: right after each edit, after N edits, and after N edits with PRUNE. Nothing is
scored here. The values are written to the run's samples, for `editkit report`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from editkit.errors import OptionError, message
from editkit.evaluation.base import AbstractEditSamples, Moment, Samples
from editkit.lazy import torch
from editkit.model.editable import EditableModel
from editkit.targets.keys import keys_and_outputs
from editkit.types import EditRequest, Measurement

SAMPLES = "values"
CURRENT = "current"  # key of a view's values right after each edit: (requests so far, O)


@dataclass(frozen=True, kw_only=True)
class Values(AbstractEditSamples):
    """It takes the place of a suite. Without `immediate` in `evaluation.timings`, the values right
    after an edit are unknown.
    """

    name: str
    count: int  # number of first edits
    every: int

    def __post_init__(self) -> None:
        problems = [
            message(key, "out of range", got=value, expected="at least 1")
            for key, value in (("count", self.count), ("every", self.every))
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
        first = [
            request
            for request, position in zip(requests, moment.positions, strict=True)
            if position <= self.count
        ]
        if moment.is_before or not first:
            return []
        now_NO, current_NO = values(model, first), notes.get(f"{CURRENT}/{moment.view}")
        rows = []
        for place, request in enumerate(first):
            current = (
                None
                if current_NO is None or place >= len(current_NO)
                else _numbers(current_NO[place])
            )
            rows.append(
                {
                    "request": request.id,
                    "module": edited(model),
                    "current": current,
                    "now": _numbers(now_NO[place]),
                }
            )
        return [Samples(name=SAMPLES, rows=tuple(rows))]

    def note(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> Mapping[str, torch.Tensor]:
        fresh = [
            request
            for request, position in zip(requests, moment.positions, strict=True)
            if position <= self.count
        ]
        if not fresh:
            return notes
        key = f"{CURRENT}/{moment.view}"
        known = [notes[key]] if key in notes else []
        return {**notes, key: torch.cat([*known, values(model, fresh)])}


def values(model: EditableModel, requests: Sequence[EditRequest]) -> torch.Tensor:
    """(N, O) float32 on the CPU: the last edited matrix's outputs at each subject's last token, for
    the prompt without a context template.
    """
    module = edited(model)
    outputs = [
        keys_and_outputs(model, request, module=module, contexts=("{}",))[1][0]
        for request in requests
    ]
    return torch.stack(outputs).to(torch.float32).cpu()


def edited(model: EditableModel) -> str:
    """The last of the edited matrices."""
    return model.edited_modules[-1]


def _numbers(values_O: torch.Tensor) -> list[float | None]:
    return [
        number if number == number and abs(number) != float("inf") else None
        for number in map(float, values_O)
    ]
