"""The evaluator's interface, and how scores become measurements.

Probabilities, accuracies and ROUGE are in [0, 1], log-probabilities in nats. A score that is not finite counts as a failure and is counted
apart: no record is ever dropped from a mean.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.lazy import torch
    from editkit.model.editable import EditableModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """An `EvalRecord` before it is known at which step, of which view and with which timing: the other fields are the same."""

    kind: str  # "editing", "downstream" or "language"
    metric: str
    value: float | None  # None: not finite
    stderr: float | None  # sample standard deviation of the n scores over sqrt(n); None for a single one and for what is no mean
    n: int  # how many scores were averaged: requests or items
    nonfinite: int = 0  # how many of them came from numbers that are not finite
    protocol: str | None = None
    suite: str | None = None
    task: str | None = None
    task_version: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A `SampleRecord` before it is known at which step and of which view: prompts, generations and scores, an item a row."""

    name: str
    rows: tuple[Mapping[str, Any], ...]  # plain JSON values


class AbstractEvaluator(abc.ABC):
    """Something that measures a model. Concrete evaluators are frozen dataclasses: their fields are the options."""

    @abc.abstractmethod
    def baseline(self, model: EditableModel, requests: Sequence[EditRequest]) -> dict[str, torch.Tensor]:
        """What the unedited model answers: computed once at step 0 for all requests of the run, and kept in its state."""

    @abc.abstractmethod
    def evaluate(
        self, model: EditableModel, requests: Sequence[EditRequest], baseline: Mapping[str, torch.Tensor]
    ) -> Sequence[Measurement | Samples]:
        """Measures the model as it is now on `requests`: those edited so far, each of which must be in the baseline.

        Samples, which may come among the measurements, are what a reader of the numbers would want to look at.
        """


def mean_and_stderr(scores: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean (None where it is not finite) and its standard error (None also for fewer than two scores)."""
    n = len(scores)
    mean = math.fsum(scores) / n if all(map(math.isfinite, scores)) else math.nan
    if not math.isfinite(mean):
        return None, None
    if n < 2:
        return mean, None
    variance = math.fsum((score - mean) ** 2 for score in scores) / (n - 1)
    return mean, math.sqrt(variance / n)


def harmonic_mean(values: Sequence[float]) -> float:
    """n / sum(1 / value); 0 as soon as one value is 0."""
    return len(values) / math.fsum(1 / value for value in values) if all(value > 0 for value in values) else 0.0
