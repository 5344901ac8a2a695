"""General abilities of the edited model: a suite of tasks of lm-evaluation-harness, in the same
process, on the weights as they are.

Tasks, items and requests are made once and are the same at every milestone and for every view; a
measurement costs the forward passes and little else. The unedited model's scores, item by item, are
frozen at step 0, and every later measurement is compared with them on the same items
(`editkit.evaluation.statistics.paired`).

A log-probability that is not finite makes its item a failure, which is counted apart. Where no
score means failure (a perplexity is best near 0) the value is None instead, and so are its error
and comparison.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError, OptionError, message
from editkit.evaluation.base import AbstractSuite, Samples
from editkit.evaluation.harness.catalogue import (
    OPTIONS,
    missing_harness,
    no_examples,
    no_room,
    own_tasks,
    room_of,
    takes_examples_from_test,
)
from editkit.evaluation.harness.lm import check_answers, check_room, harness_model
from editkit.evaluation.harness.load_tasks import Chosen, build_requests, load_tasks
from editkit.evaluation.harness.metrics import frozen_scores, measurements
from editkit.evaluation.harness.responses import Answered, Asked, ask
from editkit.evaluation.tasks.data import read
from editkit.lazy import torch
from editkit.types import EditRequest, Measurement

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


@dataclass(slots=True)
class _Bench:
    """What a suite makes once in a process. Nothing of it depends on the edits, except `last`,
    which knows the weights it belongs to.
    """

    chosen: dict[str, Chosen] = field(default_factory=dict)
    model: EditableModel | None = None  # whose the following is
    lm: Any = None
    asked: dict[str, list[Asked]] = field(default_factory=dict)  # by the suite's names
    # a digest of the weights, and what the model answered with them
    last: tuple[str, dict[str, list[Answered]]] | None = None


@dataclass(frozen=True, kw_only=True)
class Suite(AbstractSuite):
    """Tasks by name: ours (`editkit/evaluation/tasks`) and any that the harness knows."""

    name: str  # what records call the suite
    tasks: tuple[str, ...]
    # By task, the examples before each question; other tasks as their yaml says.
    shots: dict[str, int] | None
    limit: int | None  # the first so many items of each task; None: all
    seed: int  # of the examples' choice
    data: str | None  # a folder with the data; None: $EDITKIT_DATA, then the hub
    max_new_tokens: int | None  # bounds the generations of all tasks; None: as each task says
    tokens_per_batch: int
    every: int
    _bench: _Bench = field(default_factory=_Bench, init=False, repr=False, compare=False)

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

    def check(self, *, positions: int | None = None) -> None:
        """Reads the data of every task; our own need neither the harness nor torch for it."""
        if self.tasks and (missing := missing_harness(self.name)):
            raise ConfigError(missing)
        own = (
            {name: found for name, found in own_tasks().items() if name in self.tasks}
            if self.tasks
            else {}
        )
        problems: list[str] = []
        for name, found in own.items():
            try:
                read(**found[OPTIONS], data=self.data)
            except ConfigError as error:
                problems += [f"suite.tasks: {name}: {problem}" for problem in error.problems]
            if (shots := (self.shots or {}).get(name)) and takes_examples_from_test(found.get):
                problems.append(no_examples(name, shots))
        foreign = [name for name in self.tasks if name not in own]
        try:
            self._load(foreign)
        except ConfigError as error:
            problems += error.problems
        if positions is not None:
            tasks = [
                task.config
                for name in foreign
                if name in self._bench.chosen
                for task in self._bench.chosen[name].tasks
            ]
            rooms = {str(config.task): room_of(partial(getattr, config)) for config in tasks}
            rooms |= {name: room_of(found.get) for name, found in own.items()}
            bound = self.max_new_tokens or max(rooms.values(), default=0)
            problems += [
                no_room(name, min(room, bound), positions)
                for name, room in rooms.items()
                if min(room, bound) >= positions
            ]
        if problems:
            raise ConfigError(problems)

    def inputs(self, model: EditableModel) -> dict[str, str]:
        """Each task's items and questions."""
        if self.tasks:
            self._prepare(model)
        return {
            f"suite.tasks: {name}": _digest_of_items(asked)
            for name, asked in self._bench.asked.items()
        }

    def baseline(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> dict[str, torch.Tensor]:
        """The unedited model's scores, item by item."""
        return {
            name: scores
            for answers in self._answers(model).values()
            for name, scores in frozen_scores(answers).items()
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
        found: list[Measurement | Samples] = []
        is_edited = any(
            not torch.equal(model.weight(module), model.base(module))
            for module in model.edited_modules
        )
        for name, answers in self._answers(model).items():
            found += measurements(
                self.name, self._bench.chosen[name], answers, baseline if is_edited else {}
            )
            for answered in answers:
                found.append(
                    Samples(
                        name=f"{self.name}-{answered.asked.name.removeprefix(f'{self.name}_')}",
                        rows=answered.rows,
                    )
                )
        return found

    def _load(self, names: Sequence[str]) -> None:
        if missing := [name for name in names if name not in self._bench.chosen]:
            self._bench.chosen |= load_tasks(
                missing, data=self.data, shots=self.shots or {}, seed=self.seed
            )

    def _prepare(self, model: EditableModel) -> None:
        """Makes the requests, and the harness's view of the model. Raises ConfigError where the
        model is too short for some tasks.
        """
        bench = self._bench
        if bench.model is model:
            return
        self._load(self.tasks)
        lm = harness_model(
            model, tokens_per_batch=self.tokens_per_batch, max_new_tokens=self.max_new_tokens
        )
        asked: dict[str, list[Asked]] = {}
        problems: list[str] = []
        for name in self.tasks:
            asked[name] = []
            for task in bench.chosen[name].tasks:
                items = build_requests(task, limit=self.limit)
                if too_long := check_room(lm, task, positions=model.max_length):
                    problems.append(too_long)
                    continue
                problems += check_answers(lm, task, positions=model.max_length)
                cut = {item: max(map(lm.cut, requests)) for item, requests in items.items()}
                asked[name].append(
                    Asked(name=str(task.config.task), task=task, items=items, cut=cut)
                )
        if problems:
            raise ConfigError(problems)
        bench.model, bench.lm, bench.asked, bench.last = model, lm, asked, None

    def _answers(self, model: EditableModel) -> dict[str, list[Answered]]:
        """What the model answers now, by the suite's tasks.

        The last answers are kept with a digest of the weights: the unedited model, and a view that
        restrains nothing, are asked once.
        """
        if not self.tasks:
            return {}
        self._prepare(model)
        digest = _digest(model)
        if self._bench.last is None or self._bench.last[0] != digest:
            self._bench.last = digest, ask(self._bench.lm, self._bench.asked)
        return self._bench.last[1]


def _digest_of_items(asked: Sequence[Asked]) -> str:
    """Of every question as the model gets it, and of the item that says what is right."""
    total = hashlib.sha256()
    for each in asked:
        for item, requests in each.items.items():
            total.update(
                repr(
                    (each.name, item, requests[0].doc, [request.arguments for request in requests])
                ).encode()
            )
    return total.hexdigest()


def _digest(model: EditableModel) -> str:
    """Of the matrices that edits can change, as they are."""
    total = hashlib.blake2b(digest_size=16)
    for module in model.edited_modules:
        total.update(model.weight(module).contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return total.hexdigest()
