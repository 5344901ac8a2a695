"""General abilities of the edited model: a suite of tasks of lm-evaluation-harness, in the same
process and on the current weights.

Tasks, items and requests are made once and are the same at every milestone and for every view. A
measurement costs little more than its forward passes. The unedited model's scores are frozen at
step 0, item by item. Every later measurement is compared with them on the same items
(`editkit.evaluation.statistics.paired`).

A log-probability that is not finite makes its item a failure, which is counted in `nonfinite`. If
no score stands for a failure (a perplexity is best near 0), the value is None, and so are its error
and its comparison.
"""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError, OptionError, message
from editkit.evaluation.base import AbstractSuite, Samples
from editkit.evaluation.harness.catalogue import (
    OPTIONS,
    listed_examples,
    missing_harness,
    no_examples,
    no_room,
    own_tasks,
    room_of,
    takes_examples_from_test,
    too_few_examples,
)
from editkit.evaluation.harness.lm import check_answers, check_room, harness_model
from editkit.evaluation.harness.load_tasks import LoadedTasks, build_requests, load_tasks
from editkit.evaluation.harness.metrics import frozen_scores, measurements
from editkit.evaluation.harness.responses import PreparedTask, ScoredTask, respond
from editkit.evaluation.tasks.data import read
from editkit.lazy import torch
from editkit.types import EditRequest, Measurement

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


class AbstractUnpreparedSuite(AbstractSuite):
    """A suite that is prepared anew for each call. A run prepares it once (`prepare`)."""

    @abc.abstractmethod
    def prepare(self, model: EditableModel) -> PreparedSuite: ...

    def inputs(self, model: EditableModel) -> dict[str, str]:
        return self.prepare(model).inputs(model)

    def baseline(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> dict[str, torch.Tensor]:
        return self.prepare(model).baseline(model, requests)

    def evaluate(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
    ) -> list[Measurement | Samples]:
        return self.prepare(model).evaluate(model, requests, baseline)


@dataclass(frozen=True, kw_only=True)
class Suite(AbstractUnpreparedSuite):
    """Tasks by name: editkit's own (`editkit/evaluation/tasks`) and any that the harness knows."""

    name: str  # in records
    tasks: tuple[str, ...]
    # The number of examples before each question, by task; for other tasks that of their yaml.
    shots: dict[str, int] | None
    limit: int | None  # the number of first items of each task; None: all
    seed: int  # of the choice of examples
    data: str | None  # a folder with the data; None: $EDITKIT_DATA, then the hub
    max_new_tokens: int | None  # bounds the generations of all tasks; None: each task's own bound
    tokens_per_batch: int
    every: int

    def __post_init__(self) -> None:
        keys = ("limit", "max_new_tokens", "tokens_per_batch", "every")
        problems = [
            message(key, "out of range", got=value, expected="at least 1")
            for key in keys
            if (value := getattr(self, key)) is not None and value < 1
        ]
        for name, count in (self.shots or {}).items():
            if name not in self.tasks:
                expected = f"one of the tasks: {', '.join(self.tasks) or 'none'}"
                problems.append(message("shots", "unknown task", got=name, expected=expected))
            if count < 0:
                key = f"shots.{name}"
                problems.append(message(key, "out of range", got=count, expected="at least 0"))
        if repeated := sorted({name for name in self.tasks if self.tasks.count(name) > 1}):
            problems.append(message("tasks", "chosen more than once", got=", ".join(repeated)))
        if problems:
            raise OptionError(problems)

    def check(self, *, positions: int | None = None) -> LoadedSuite:
        """Reads the data of every task. Editkit's own tasks need neither the harness nor torch for
        it.
        """
        if self.tasks and (missing := missing_harness(self.name)):
            raise ConfigError(missing)
        own = (
            {name: content for name, content in own_tasks().items() if name in self.tasks}
            if self.tasks
            else {}
        )
        problems: list[str] = []
        for name, content in own.items():
            try:
                read(**content[OPTIONS], data=self.data)
            except ConfigError as error:
                problems += [f"suite.tasks: {name}: {problem}" for problem in error.problems]
            shots = (self.shots or {}).get(name) or 0
            if shots and takes_examples_from_test(content.get):
                problems.append(no_examples(name, shots))
            elif shots > (listed := listed_examples(content.get) or shots):
                problems.append(too_few_examples(name, shots, listed))
        loaded: dict[str, LoadedTasks] = {}
        try:
            loaded = self.load([name for name in self.tasks if name not in own])
        except ConfigError as error:
            problems += error.problems
        if positions is not None:
            tasks = [task.config for chosen in loaded.values() for task in chosen.tasks]
            rooms = {str(config.task): room_of(partial(getattr, config)) for config in tasks}
            rooms |= {name: room_of(content.get) for name, content in own.items()}
            bound = self.max_new_tokens or max(rooms.values(), default=0)
            problems += [
                no_room(name, min(room, bound), positions)
                for name, room in rooms.items()
                if min(room, bound) >= positions
            ]
        if problems:
            raise ConfigError(problems)
        return LoadedSuite(self, loaded)

    def load(self, names: Sequence[str]) -> dict[str, LoadedTasks]:
        """The tasks of these names, with their data."""
        if not names:
            return {}
        return load_tasks(names, data=self.data, shots=self.shots or {}, seed=self.seed)

    def prepare(self, model: EditableModel) -> PreparedSuite:
        """Loads all tasks and makes their questions for the model."""
        return LoadedSuite(self, {}).prepare(model)


class LoadedSuite(AbstractUnpreparedSuite):
    """A suite with the tasks that its check has loaded."""

    def __init__(self, options: Suite, loaded: Mapping[str, LoadedTasks]) -> None:
        """`loaded` may lack tasks of the suite, which are loaded when they are needed."""
        self.options, self.loaded = options, loaded
        self.every = options.every

    def check(self, *, positions: int | None = None) -> LoadedSuite:
        """As the suite that it was loaded for."""
        return self.options.check(positions=positions)

    def prepare(self, model: EditableModel) -> PreparedSuite:
        """Loads the remaining tasks and makes the questions of all tasks for the model. Raises
        ConfigError if a task does not fit the model's context length.
        """
        options = self.options
        if not options.tasks:
            return PreparedSuite(options, {}, {}, None)
        missing = [name for name in options.tasks if name not in self.loaded]
        loaded = {**self.loaded, **options.load(missing)}
        lm = harness_model(
            model, tokens_per_batch=options.tokens_per_batch, max_new_tokens=options.max_new_tokens
        )
        prepared: dict[str, list[PreparedTask]] = {}
        problems: list[str] = []
        for name in options.tasks:
            prepared[name] = []
            for task in loaded[name].tasks:
                chat = lm.apply_chat_template if model.chat is not None else None
                items = build_requests(task, limit=options.limit, chat=chat)
                if too_long := check_room(lm, task, positions=model.max_length):
                    problems.append(too_long)
                    continue
                problems += check_answers(lm, task, positions=model.max_length)
                cut = {item: max(map(lm.cut, requests)) for item, requests in items.items()}
                prepared[name].append(
                    PreparedTask(name=str(task.config.task), task=task, items=items, cut=cut)
                )
        if problems:
            raise ConfigError(problems)
        return PreparedSuite(options, loaded, prepared, lm)


class PreparedSuite(AbstractSuite):
    """A suite with its questions for one model, the same at every milestone and for every view.

    Attributes:
        last: the last scores. They are used again while the weights, and what stands beside them,
            are the same: the unedited model, and a view that restrains nothing, are measured in one
            pass.
    """

    def __init__(
        self,
        options: Suite,
        loaded: Mapping[str, LoadedTasks],
        prepared: Mapping[str, Sequence[PreparedTask]],
        lm: Any,
    ) -> None:
        """`loaded` and `prepared` are by the suite's names of the tasks. `lm` is the harness's view
        of the model.
        """
        self.options, self.loaded, self.prepared = options, loaded, prepared
        self.every = options.every
        self.last: LastScores | None = None
        self._lm = lm

    def check(self, *, positions: int | None = None) -> PreparedSuite:
        """Nothing is left to check."""
        return self

    def inputs(self, model: EditableModel) -> dict[str, str]:
        """The items and questions of each task."""
        return {
            f"suite.tasks: {name}": _digest_of_items(tasks) for name, tasks in self.prepared.items()
        }

    def baseline(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> dict[str, torch.Tensor]:
        """The unedited model's scores, item by item."""
        return {
            name: scores
            for tasks in self._scored(model).values()
            for name, scores in frozen_scores(tasks).items()
        }

    def evaluate(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
    ) -> list[Measurement | Samples]:
        """Measures general ability; the requests do not matter. The unedited model is not compared
        with itself.
        """
        name = self.options.name
        results: list[Measurement | Samples] = []
        is_edited = bool(model.sides) or any(
            not torch.equal(model.weight(module), model.base(module))
            for module in model.edited_modules
        )
        for task, scored_tasks in self._scored(model).items():
            frozen = baseline if is_edited else {}
            results += measurements(name, self.loaded[task], scored_tasks, frozen)
            for scored in scored_tasks:
                short = scored.prepared.name.removeprefix(f"{name}_")
                results.append(Samples(name=f"{name}-{short}", rows=scored.rows))
        return results

    def _scored(self, model: EditableModel) -> Mapping[str, Sequence[ScoredTask]]:
        """The scores of the model with its current weights, by the suite's names of the tasks."""
        if not self.prepared:
            return {}
        digest = _digest(model)
        if self.last is None or self.last.weights != digest:
            self.last = LastScores(weights=digest, tasks=respond(self._lm, self.prepared))
        return self.last.tasks


@dataclass(frozen=True, slots=True, kw_only=True)
class LastScores:
    """Scored tasks by the suite's names, and the digest of the weights that gave the scores."""

    weights: str
    tasks: Mapping[str, Sequence[ScoredTask]]


def _digest_of_items(prepared: Sequence[PreparedTask]) -> str:
    """The digest of every question as the model gets it, and of its item with the right answer."""
    total = hashlib.sha256()
    for task in prepared:
        for item, requests in task.items.items():
            arguments = [request.arguments for request in requests]
            total.update(repr((task.name, item, requests[0].doc, arguments)).encode())
    return total.hexdigest()


def _digest(model: EditableModel) -> str:
    """The digest of the current weights that edits can change, and of what stands beside them."""
    total = hashlib.blake2b(digest_size=16)
    for module in model.edited_modules:
        total.update(_bytes(model.weight(module)))
    for side in model.sides:
        total.update(repr((type(side).__qualname__, side.options())).encode())
        for name, tensor in side.state().items():
            total.update(f"{name}{tuple(tensor.shape)}".encode())
            total.update(_bytes(tensor))
    return total.hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    values = tensor.detach().contiguous().reshape(-1)
    content: bytes = values.view(torch.uint8).cpu().numpy().tobytes()
    return content
