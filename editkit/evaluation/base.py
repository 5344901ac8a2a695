"""The interfaces of evaluators.

Probabilities, accuracies and ROUGE are in [0, 1], log-probabilities in nats. A score that is not
finite is a failure and is counted in `nonfinite`. No record is ever dropped from a mean.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from editkit.records.means import mean_and_stderr as mean_and_stderr  # for evaluators of users
from editkit.types import EditRequest, Measurement

if TYPE_CHECKING:
    from editkit.lazy import torch
    from editkit.model.editable import EditableModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """A `SampleRecord` without step and view: a row of prompts, generations and scores per item."""

    name: str
    rows: tuple[Mapping[str, Any], ...]  # plain JSON values


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The time of a measurement, and the edits that it is about."""

    view: str
    positions: tuple[int, ...]  # of the requests among the run's edits, counted from 1
    is_before: bool = False  # the unedited model, on the edits to come
    # With rollback: these edits were made alone, and the model will never hold them again.
    is_alone: bool = False


class AbstractEvaluator(abc.ABC):
    """It measures a model. The configured ones are frozen dataclasses: their fields are options."""

    def prepare(self, model: EditableModel) -> AbstractEvaluator:
        """The evaluator with everything that it computes once for a model. A run calls this before
        it measures; by default it is the evaluator itself.
        """
        return self

    def inputs(self, model: EditableModel) -> Mapping[str, str]:
        """Digests of the data that it reads besides model and requests, by option. They must not
        change when a run resumes.
        """
        return {}

    @abc.abstractmethod
    def baseline(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> Mapping[str, torch.Tensor]:
        """The frozen answers of the unedited model: computed once at step 0 for all requests of the
        run, and kept in its state.
        """

    @abc.abstractmethod
    def evaluate(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
    ) -> Sequence[Measurement | Samples]:
        """Measures the model with its current weights on `requests`: those edited so far, all of
        which are in the baseline. Samples are returned among the measurements.
        """


class AbstractEditEvaluator(AbstractEvaluator):
    """An evaluator that judges the edits themselves, so that it matters when each was made.

    What it observes right after an edit goes into its notes, which the run's state keeps.
    """

    # Whether it notes each edit if evaluation.timings has `immediate`; False: with rollback alone.
    is_immediate: ClassVar[bool] = True

    def evaluate(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
    ) -> Sequence[Measurement | Samples]:
        """Measures the requests as the edits that were made so far, in their order."""
        moment = Moment(view="", positions=tuple(range(1, len(requests) + 1)))
        return self.measure(model, requests, baseline, {}, moment)

    @abc.abstractmethod
    def measure(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> Sequence[Measurement | Samples]:
        """`evaluate` at a known moment: also blocks of edits, and comparisons with the notes."""

    @abc.abstractmethod
    def note(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> Mapping[str, torch.Tensor]:
        """The notes with those of requests whose edits were made in this step. It is called once
        for each request and view, in the order of edits.
        """

    @abc.abstractmethod
    def noted(
        self,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
        *,
        timing: str,
    ) -> Sequence[Measurement | Samples]:
        """The notes of the moment's requests as measurements and samples, without a model."""


class AbstractSuite(AbstractEvaluator):
    """Tasks that stand for general abilities: an evaluator with data of its own, which is checked
    before a model is loaded.
    """

    # It measures at every so many milestones, and always at the first and at the last.
    every: int

    @abc.abstractmethod
    def check(self, *, positions: int | None = None) -> AbstractSuite:
        """Reads the data of every task, and returns the suite with it.

        Args:
            positions: the model's context length; None: not known before the model is loaded.

        Raises:
            ConfigError: for all tasks together, where the data of a task was looked for and how to
                provide it, or that a task does not fit the context length.
        """


class AbstractEditSamples(AbstractSuite, AbstractEditEvaluator):
    """An evaluator that writes samples about the edits and scores nothing. It takes the place of a
    suite, needs no data, and keeps no answer of the unedited model.
    """

    def check(self, *, positions: int | None = None) -> Self:
        return self

    def baseline(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> Mapping[str, torch.Tensor]:
        return {}

    def noted(
        self,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
        *,
        timing: str,
    ) -> Sequence[Measurement | Samples]:
        return []
