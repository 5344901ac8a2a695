"""A model's responses to a task of the harness, and the task's scores, item by item."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editkit.evaluation.harness.lm import quiet

Key = tuple[str, str]  # metric and filter
NO_FILTER = "none"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedTask:
    """One lm-eval task with its requests. The requests hold their last responses."""

    name: str
    task: Any
    items: Mapping[int, Sequence[Any]]  # the harness's requests by item
    cut: Mapping[int, int]  # by item, the tokens that its longest prompt lost

    @property
    def label(self) -> str:
        """The name in records."""
        return str(self.task.config.task_alias or self.name)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredTask:
    """The model's responses to one task, scored."""

    prepared: PreparedTask
    # By item. A metric may leave items out. None: not finite, and no number stands for a failure.
    scores: Mapping[Key, Mapping[int, Any]]
    nonfinite: frozenset[int]  # items
    rows: tuple[Mapping[str, Any], ...]  # prompt, output and scores of each item, as JSON values

    def in_order(self, key: Key) -> list[float]:
        """A metric's score for each item: nan if it leaves the item out, inf if the score is
        None.
        """
        scores = self.scores.get(key, {})
        return [
            math.inf if (score := scores.get(item, math.nan)) is None else float(score)
            for item in self.prepared.items
        ]

    @property
    def numbers(self) -> list[Key]:
        """The metrics that score each item with a number. Others score all items together."""
        return [
            key
            for key, scores in self.scores.items()
            if all(score is None or is_number(score) for score in scores.values())
        ]


def respond(lm: Any, prepared: Mapping[str, Sequence[PreparedTask]]) -> dict[str, list[ScoredTask]]:
    """The responses to all tasks. Requests of one kind are scored together, as in the harness."""
    by_kind: dict[str, list[Any]] = {}
    for tasks in prepared.values():
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
        return {name: [score(task) for task in tasks] for name, tasks in prepared.items()}


def score(prepared: PreparedTask) -> ScoredTask:
    """The task's own filters and metrics over the responses that its requests hold."""
    prepared.task.apply_filters()
    scores: dict[Key, dict[int, Any]] = {}
    rows: list[dict[str, Any]] = []
    nonfinite = frozenset(
        item for item, requests in prepared.items.items() if not all(map(_is_finite, requests))
    )
    declared = [metric["metric"] for metric in prepared.task.config.metric_list or ()]
    for item, requests in prepared.items.items():
        first = requests[0]
        row = {
            "item": item,
            "prompt": first.args[0],
            "target": plain(prepared.task.doc_to_target(first.doc)),
            "output": _output(requests),
        }
        row |= {"cut": prepared.cut[item]} if prepared.cut[item] else {}
        for name in first.filtered_resps:
            for metric in declared:  # a metric that leaves out every item is measured on none
                scores.setdefault((str(metric), name), {})
            results = prepared.task.process_results(
                first.doc, [request.filtered_resps[name] for request in requests]
            )
            for metric, value in results.items():
                kept = failure(prepared.task, metric) if item in nonfinite else value
                scores.setdefault((metric, name), {})[item] = kept
                row[title((metric, name), filters=len(first.filtered_resps))] = plain(kept)
        rows.append(row)
    return ScoredTask(prepared=prepared, scores=scores, nonfinite=nonfinite, rows=tuple(rows))


def rule_of(task: Any, metric: str) -> Callable[[list[Any]], float]:
    """The aggregation of the items' scores. It is the mean if the task names none, as in the
    harness.
    """
    from lm_eval.api.metrics import mean

    rule: Callable[[list[Any]], float] = task.aggregation().get(metric, mean)
    return rule


def is_mean(rule: Callable[[list[Any]], float]) -> bool:
    """Whether the rule is a mean, also the one without nan."""
    from lm_eval.api.metrics import mean, nanmean

    return rule in (mean, nanmean)


def failure(task: Any, metric: str) -> float | None:
    """The score of an item whose log-probabilities are not finite. It replaces the task's own: nan
    wins every argmax.

    It is 0 if scores are averaged and higher is better. Otherwise 0 could be the best score
    (lambada's perplexity is exp(-mean)), and it is None.
    """
    return 0.0 if is_mean(rule_of(task, metric)) and task.higher_is_better().get(metric) else None


def _output(requests: Sequence[Any]) -> Any:
    """A generated text; or (continuation, log-probability, is greedy) of each choice; or the
    log-probability of a whole text.
    """
    if requests[0].request_type == "loglikelihood":
        return [[request.args[1], *plain(request.resps[0])] for request in requests]
    return plain(requests[0].resps[0])


def _is_finite(request: Any) -> bool:
    response = request.resps[0]
    number = response[0] if isinstance(response, tuple) else response
    return isinstance(number, str) or math.isfinite(number)


def title(key: Key, *, filters: int) -> str:
    """The metric's name, with the filter's name if the task has several."""
    metric, name = key
    return metric if filters == 1 or name == NO_FILTER else f"{metric}/{name}"


def is_number(value: Any) -> bool:
    """Whether it is a number of Python or numpy."""
    return isinstance(value, bool | int | float) or (
        getattr(value, "shape", None) == () and hasattr(value, "item")
    )


def plain(value: Any) -> Any:
    """The value as a JSON value. A number that is not finite becomes None."""
    if isinstance(value, str | bool | int | None):
        return value
    if is_number(value):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value)
