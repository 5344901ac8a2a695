"""An analysis is a question about the edited model of a run. It gives JSON values, tables for the
terminal and a figure.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from editkit.config.parts import Parts
from editkit.errors import ConfigError, message
from editkit.records.reader import RunRecords
from editkit.runner.checkpoint import RunState
from editkit.runner.export import edited_model
from editkit.types import EditRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from editkit.model.editable import EditableModel

UNEDITED = "unedited"


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Text cells below a head."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """The edited model of a run, and the first of its edits."""

    records: RunRecords
    state: RunState
    model: EditableModel
    requests: tuple[EditRequest, ...]
    view: str  # "unrestrained", or the name of a view

    def models(self) -> Iterator[str]:
        """The two models one after the other, by name: inside the loop over them `model` is the
        unedited model, then the edited one.
        """
        with self.unedited():
            yield UNEDITED
        yield self.view

    @contextlib.contextmanager
    def unedited(self) -> Iterator[None]:
        """`model` is the unedited model inside the block."""
        sides = self.model.sides
        try:
            self.model.attach()
            with self.model.unedited(self.model.edited_modules):
                yield
        finally:
            self.model.attach(*sides)


@dataclass(frozen=True, kw_only=True)
class AbstractAnalysis(abc.ABC):
    """One analysis. Its options are its fields, and its results are JSON values."""

    name: ClassVar[str]
    needs_weights: ClassVar[bool] = False  # whether it reads the updates of matrices

    def problems(self, subject: Subject) -> list[str]:
        """Why it cannot be made."""
        if self.needs_weights and not subject.model.edited_modules:
            problem = "the run changed no matrix, its edits stand beside the weights"
            return [message(str(subject.records.folder), problem)]
        return []

    @abc.abstractmethod
    def measure(self, subject: Subject) -> dict[str, Any]:
        """The results. The model is the edited one before and after."""

    @abc.abstractmethod
    def tables(self, results: Mapping[str, Any]) -> Sequence[Table]:
        """The results for the terminal and the page."""

    def draw(self, results: Mapping[str, Any]) -> Figure | None:
        """The results as a figure; None if they have none."""
        return None


def open_run(run: Path, *, view: str | None, requests: int) -> Subject:
    """The model of a run's last checkpoint, and the first of the edits that it has made.

    Args:
        requests: at most so many edits.

    Raises:
        ConfigError: the run has no checkpoint, or no such view; the model or the dataset is missing
            or has changed.
    """
    if requests < 1:
        raise ConfigError(message("--requests", "out of range", got=requests, expected="1 or more"))
    model, records, state = edited_model(run, view=view)
    made = requests_of(records)[: _num_requests(records, state)]
    return Subject(
        records=records,
        state=state,
        model=model,
        requests=made[:requests],
        view=view or records.trajectory_view,
    )


def _num_requests(records: RunRecords, state: RunState) -> int:
    return sum(len(step.requests) for step in records.steps if step.step <= state.step)


def requests_of(records: RunRecords) -> tuple[EditRequest, ...]:
    """The edit requests of a run, in their order, read from its dataset again.

    Raises:
        ConfigError: the dataset is missing, or is not the one that was edited.
    """
    from editkit.datasets.base import AbstractDataset

    parts = Parts(records.config)
    settings, dataset = parts.settings(), parts.one("dataset", AbstractDataset)
    data = parts.load(dataset, settings)
    parts.finish()
    assert data is not None
    noted = (records.provenance.get("dataset") or {}).get("digest")
    by_id = {request.id: request for request in data.requests}
    ids = records.provenance.get("requests") or []
    if noted != data.digest or any(id not in by_id for id in ids):
        problem = f"this is not the dataset that was edited in {records.folder}"
        raise ConfigError(message("dataset", problem, got=data.origin))
    return tuple(by_id[id] for id in ids)
