"""The evaluator's interface, and what it measures.

Probabilities, accuracies and ROUGE are in [0, 1], log-probabilities in nats. A score that is not
finite counts as a failure and is counted apart: no record is ever dropped from a mean.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editkit.types import EditRequest, Measurement

if TYPE_CHECKING:
    from editkit.lazy import torch
    from editkit.model.editable import EditableModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A `SampleRecord` before it is known at which step and of which view: prompts, generations and
    scores, an item a row.
    """

    name: str
    rows: tuple[Mapping[str, Any], ...]  # plain JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When an evaluator is asked, and about which of the run's edits."""

    view: str
    positions: tuple[int, ...]  # of the requests among the run's edits, counted from 1
    is_before: bool = False  # the unedited model, on the edits to come
    # with rollback: these edits were made alone, and the model will never hold them again
    is_alone: bool = False


class AbstractEvaluator(abc.ABC):
    """Something that measures a model. Concrete evaluators are frozen dataclasses: their fields are
    the options.
    """

    def prepare(self, model: EditableModel) -> AbstractEvaluator:
        """The evaluator with everything that it computes once for a model. A run calls this before
        it measures; by default it is the evaluator itself.
        """
        return self

    def inputs(self, model: EditableModel) -> Mapping[str, str]:
        """Digests of what it reads besides the model and the requests, by what that is: a run that
        goes on must read the same.
        """
        return {}

    @abc.abstractmethod
    def baseline(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> Mapping[str, torch.Tensor]:
        """What the unedited model answers: computed once at step 0 for all requests of the run, and
        kept in its state.
        """

    @abc.abstractmethod
    def evaluate(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
    ) -> Sequence[Measurement | Samples]:
        """Measures the model as it is now on `requests`: those edited so far, each of which must be
        in the baseline.

        Samples, which may come among the measurements, are what a reader of the numbers would want
        to look at.
        """


class AbstractEditEvaluator(AbstractEvaluator):
    """One that judges the edits themselves, so that it matters when each of them was made."""

    # it notes each edit where evaluation.timings ask for `immediate`; False: with rollback alone
    is_immediate: ClassVar[bool] = True

    @abc.abstractmethod
    def measure(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> Sequence[Measurement | Samples]:
        """`evaluate` with the moment known: blocks of edits, and what was noted right after each
        edit, can be told.
        """

    @abc.abstractmethod
    def note(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> Mapping[str, torch.Tensor]:
        """The baseline with the scores of requests that were edited in just now: each request once
        a view, in the order of edits.
        """

    @abc.abstractmethod
    def noted(
        self,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        moment: Moment,
        *,
        timing: str,
    ) -> Sequence[Measurement | Samples]:
        """The noted scores of the moment's requests as measurements, with what was kept of their
        samples; the model is not asked again.
        """


class AbstractSuite(AbstractEvaluator):
    """Tasks that stand for general abilities: an evaluator with data of its own, which is looked
    for before anything else is done.
    """

    every: int  # it measures at every so many milestones, always at the first and at the last

    @abc.abstractmethod
    def check(self, *, positions: int | None = None) -> AbstractSuite:
        """Reads the data of every task, and returns the suite with it.

        Args:
            positions: the model's context length; None: not known before the model is loaded.

        Raises:
            ConfigError: for all tasks together, where the data of a task was looked for and how to
                provide it, or that a task does not fit the context length.
        """


def mean_and_stderr(scores: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean (None where it is not finite) and its standard error (None also for fewer than two
    scores).
    """
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
    return (
        len(values) / math.fsum(1 / value for value in values)
        if all(value > 0 for value in values)
        else 0.0
    )
