"""What the model answers to a task of the harness, and how that task scores it, item by item."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editkit.evaluation.harness.lm import quiet

Key = tuple[str, str]  # metric and filter
NO_FILTER = "none"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Asked:
    """One lm-eval task with its requests, made once. Its requests hold the responses of the last
    time.
    """

    name: str
    task: Any
    items: Mapping[int, Sequence[Any]]  # the harness's requests by item
    cut: Mapping[int, int]  # by item, how many tokens its longest prompt lost

    @property
    def label(self) -> str:
        """What records call it."""
        return str(self.task.config.task_alias or self.name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Answered:
    """What the model made of one task."""

    asked: Asked
    scores: Mapping[
        Key, Mapping[int, Any]
    ]  # by item; a metric may leave items out; None: not finite, and no number would say so
    nonfinite: frozenset[int]  # items
    rows: tuple[
        Mapping[str, Any], ...
    ]  # prompt, output and scores of each item, as plain JSON values

    def in_order(self, key: Key) -> list[float]:
        """A metric's score for each item: nan for one that it leaves out, inf for one whose score
        is None.
        """
        scores = self.scores.get(key, {})
        return [
            math.inf if (score := scores.get(item, math.nan)) is None else float(score)
            for item in self.asked.items
        ]

    @property
    def numbers(self) -> list[Key]:
        """The metrics that give each item a number; others want all items together."""
        return [
            key
            for key, scores in self.scores.items()
            if all(score is None or is_number(score) for score in scores.values())
        ]


def ask(lm: Any, asked: Mapping[str, Sequence[Asked]]) -> dict[str, list[Answered]]:
    """All requests of one kind together, as the harness does."""
    by_kind: dict[str, list[Any]] = {}
    for tasks in asked.values():
        for task in tasks:
            for requests in task.items.values():
                for request in requests:
                    by_kind.setdefault(request.request_type, []).append(request)
    with quiet():
        for kind, of_kind in by_kind.items():
            for request, response in zip(
                of_kind, getattr(lm, kind)(of_kind, disable_tqdm=True), strict=True
            ):
                request.resps, request.filtered_resps = [response], {}
        return {name: [score(task) for task in tasks] for name, tasks in asked.items()}


def score(asked: Asked) -> Answered:
    """The task's own filters and metrics over the responses that its requests hold."""
    asked.task.apply_filters()
    scores: dict[Key, dict[int, Any]] = {}
    rows: list[dict[str, Any]] = []
    nonfinite = frozenset(
        item for item, requests in asked.items.items() if not all(map(_is_finite, requests))
    )
    declared = [each["metric"] for each in asked.task.config.metric_list or ()]
    for item, requests in asked.items.items():
        first = requests[0]
        row = {
            "item": item,
            "prompt": first.args[0],
            "target": plain(asked.task.doc_to_target(first.doc)),
            "output": _output(requests),
        }
        row |= {"cut": asked.cut[item]} if asked.cut[item] else {}
        for name in first.filtered_resps:
            for (
                metric
            ) in declared:  # one that leaves out every item is measured all the same, on none
                scores.setdefault((str(metric), name), {})
            found = asked.task.process_results(
                first.doc, [request.filtered_resps[name] for request in requests]
            )
            for metric, value in found.items():
                kept = failure(asked.task, metric) if item in nonfinite else value
                scores.setdefault((metric, name), {})[item] = kept
                row[title((metric, name), filters=len(first.filtered_resps))] = plain(kept)
        rows.append(row)
    return Answered(asked=asked, scores=scores, nonfinite=nonfinite, rows=tuple(rows))


def rule_of(task: Any, metric: str) -> Callable[[list[Any]], float]:
    """What makes the items' scores the task's value; the harness, too, takes the mean where a task
    names nothing.
    """
    from lm_eval.api.metrics import mean

    rule: Callable[[list[Any]], float] = task.aggregation().get(metric, mean)
    return rule


def is_mean(rule: Callable[[list[Any]], float]) -> bool:
    """Also the one that leaves out what is nan."""
    from lm_eval.api.metrics import mean, nanmean

    return rule in (mean, nanmean)


def failure(task: Any, metric: str) -> float | None:
    """The score of an item whose log-probabilities are not finite, whatever the task makes of them:
    nan wins every argmax.

    0 where scores are averaged and more is better. Elsewhere, 0 could be the best of all (lambada's
    perplexity is exp(-mean)): None.
    """
    return 0.0 if is_mean(rule_of(task, metric)) and task.higher_is_better().get(metric) else None


def _output(requests: Sequence[Any]) -> Any:
    """A generated text; or (continuation, log-probability, is greedy) of each choice; or a whole
    text's log-probability.
    """
    if requests[0].request_type == "loglikelihood":
        return [[request.args[1], *plain(request.resps[0])] for request in requests]
    return plain(requests[0].resps[0])


def _is_finite(request: Any) -> bool:
    response = request.resps[0]
    number = response[0] if isinstance(response, tuple) else response
    return isinstance(number, str) or math.isfinite(number)


def title(key: Key, *, filters: int) -> str:
    """The metric's name, with the filter's where a task has several."""
    metric, name = key
    return metric if filters == 1 or name == NO_FILTER else f"{metric}/{name}"


def is_number(value: Any) -> bool:
    """Python's or numpy's."""
    return isinstance(value, bool | int | float) or (
        getattr(value, "shape", None) == () and hasattr(value, "item")
    )


def plain(value: Any) -> Any:
    """As a JSON value; a number that is not finite becomes None."""
    if isinstance(value, str | bool | int | None):
        return value
    if is_number(value):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value)
