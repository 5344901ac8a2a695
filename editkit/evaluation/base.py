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

from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.lazy import torch
    from editkit.model.editable import EditableModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """An `EvalRecord` before it is known at which step and of which view: the other fields are the
    same.
    """

    # "editing", "downstream", "language", or "comparison" (of a task with the unedited model)
    kind: str
    metric: str
    value: float | None  # None: not finite
    # Sample standard deviation of the n scores over sqrt(n), by prompt the cluster-robust one
    # (editkit.evaluation.statistics.tally); None for a single score and for what is no mean.
    stderr: float | None
    n: int  # how many scores were averaged: requests, prompts or items
    nonfinite: int = 0  # how many of them came from numbers that are not finite
    low: float | None = None  # bootstrap confidence interval, where one was asked for
    high: float | None = None
    protocol: str | None = None
    timing: str | None = None  # None: that of the moment, "before" or "milestone"
    suite: str | None = None
    task: str | None = None
    task_version: float | None = None
    shots: int | None = None  # how many examples stand before each of a task's questions
    cut: int | None = (
        # how many of the items had a prompt longer than the model's positions, which lost its
        # beginning
        None
    )
    variant: str | None = (
        # how this number differs from what its name says: "published code: the gold rationale is in
        # the prompt"
        None
    )
    block: str | None = None  # "1-50": these edits alone, as they are counted from 1
    subset: str | None = (
        None  # "known_before", "unknown_before" or "succeeded": these requests alone
    )
    aggregation: str | None = None  # what n counts: "request" or "prompt"
    context: str | None = None  # what every prompt stood in, "{}" for the prompt alone
    max_new_tokens: int | None = None  # where a free generation was cut
    max_tokens: int | None = None  # how long a generated text may be, its prompt included


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

    is_immediate: ClassVar[bool] = (
        # it notes each edit where evaluation.timings ask for `immediate`; False: with rollback
        # alone
        True
    )

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
    def check(self, *, positions: int | None = None) -> None:
        """Reads every task's data. Raises ConfigError with the task, where its data was looked for
        and what to do; all tasks at once.

        Args:
            positions: of the model, to which tasks must fit; None: not known before it is loaded.
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
