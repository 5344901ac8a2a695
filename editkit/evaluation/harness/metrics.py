"""From a task's scores to measurements: values, standard errors, and comparisons with the frozen
scores of the unedited model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editkit.evaluation.harness.load_tasks import LoadedTasks, examples_are_tested
from editkit.evaluation.harness.responses import Key, ScoredTask, is_mean, rule_of, title
from editkit.evaluation.statistics.paired import (
    Comparison,
    Part,
    aggregate,
    bootstrap_stderr,
    compare,
    compare_aggregates,
)
from editkit.lazy import torch
from editkit.records.means import mean_and_stderr
from editkit.types import Measurement

if TYPE_CHECKING:
    Frozen = Mapping[str, torch.Tensor]


def frozen_scores(scored_tasks: Sequence[ScoredTask]) -> dict[str, torch.Tensor]:
    """float64, (items,), by `frozen_name`; nan if a metric leaves an item out. Metrics that do not
    score items with numbers are absent.
    """
    return {
        frozen_name(scored, key): torch.tensor(scored.in_order(key), dtype=torch.float64)
        for scored in scored_tasks
        for key in scored.numbers
    }


def frozen_name(scored: ScoredTask, key: Key) -> str:
    return "|".join((scored.prepared.name, *key))


def measurements(
    suite: str, chosen: LoadedTasks, scored_tasks: Sequence[ScoredTask], frozen: Frozen
) -> list[Measurement]:
    """The metrics of a task; for a group with its own metrics, these over all of its tasks.

    Args:
        frozen: the unedited model's scores; empty: nothing is compared.
    """
    if chosen.pooled is None:
        return [
            measurement
            for scored in scored_tasks
            for measurement in _measure(suite, scored.prepared.label, [scored], {}, frozen)
        ]
    return _measure(suite, chosen.name, scored_tasks, chosen.pooled, frozen)


def _measure(
    suite: str,
    label: str,
    scored_tasks: Sequence[ScoredTask],
    pooled: Mapping[str, bool],
    frozen: Frozen,
) -> list[Measurement]:
    """`pooled` is that of the group. It is empty for a single task: all metrics are measured."""
    keys = list(
        dict.fromkeys(
            key
            for scored in scored_tasks
            for key in scored.scores
            if not pooled or key[0] in pooled
        )
    )
    common = _about(suite, label, scored_tasks)
    measured: list[Measurement] = []
    for key in keys:
        parts = _parts(scored_tasks, key, by_size=pooled.get(key[0], True))
        value, stderr = _mean_of(
            [_value(part, key) for part in parts], [_weight(part, key, pooled) for part in parts]
        )
        is_language = "perplexity" in key[0] or key[0].startswith("bits_per")
        name = title(key, filters=len({filter_name for _, filter_name in keys}))
        kind = "language" if is_language else "downstream"
        n = sum(len(scored.scores.get(key, {})) for scored in scored_tasks)
        measured.append(
            Measurement(kind=kind, metric=name, value=value, stderr=stderr, n=n, **common)
        )
        pairs = [_pairs(part, key, frozen) for part in parts]
        if any(pairs):
            comparison = _compare(parts, pairs, key, pooled)
            figures = {
                "difference": (comparison.difference, comparison.stderr),
                "p_value": (comparison.p_value, None),
            }
            measured += [
                Measurement(
                    kind="comparison",
                    metric=f"{name}_{what}",
                    value=figure,
                    stderr=error,
                    n=sum(map(len, pairs)),
                    **common,
                )
                for what, (figure, error) in figures.items()
            ]
    return measured


def _about(suite: str, label: str, scored_tasks: Sequence[ScoredTask]) -> dict[str, Any]:
    """The fields that all measurements of a task or a group share."""
    task = scored_tasks[0].prepared.task
    metadata = task.config.metadata or {}
    shots = {scored.prepared.task.config.num_fewshot for scored in scored_tasks}
    given = any(shots) and any(examples_are_tested(scored.prepared.task) for scored in scored_tasks)
    variants = [
        metadata.get("variant"),
        "examples are taken from the tested records" if given else None,
    ]
    return {
        "suite": suite,
        "task": label,
        "task_version": _version(metadata.get("version")),
        "shots": shots.pop() if len(shots) == 1 else None,
        "nonfinite": sum(len(scored.nonfinite) for scored in scored_tasks),
        "cut": sum(tokens > 0 for scored in scored_tasks for tokens in scored.prepared.cut.values())
        or None,
        "variant": "; ".join(text for text in variants if text) or None,
    }


def _parts(
    scored_tasks: Sequence[ScoredTask], key: Key, *, by_size: bool
) -> list[list[ScoredTask]]:
    """The parts with a value of their own: each task, or all tasks together if every item has the
    same weight.
    """
    having = [scored for scored in scored_tasks if scored.scores.get(key)]
    if having and by_size and all(is_mean(_rule([scored], key)) for scored in having):
        return [having]
    return [[scored] for scored in having]


def _rule(part: Sequence[ScoredTask], key: Key) -> Callable[[list[Any]], float]:
    return rule_of(part[0].prepared.task, key[0])


def _weight(part: Sequence[ScoredTask], key: Key, pooled: Mapping[str, bool]) -> float:
    return sum(len(scored.scores[key]) for scored in part) if pooled.get(key[0], True) else 1


def _value(part: Sequence[ScoredTask], key: Key) -> tuple[float | None, float | None]:
    """The metric's value by the task's own rule, and its standard error: of a mean in closed form,
    otherwise by the bootstrap.
    """
    from lm_eval.api.metrics import mean

    values = [value for scored in part for value in scored.scores[key].values()]
    rule = _rule(part, key)
    if any(value is None for value in values):
        return None, None
    if rule is mean:
        return mean_and_stderr([float(value) for value in values])
    value = aggregate(rule, values)
    return (value, bootstrap_stderr(values, rule)) if math.isfinite(value) else (None, None)


def _mean_of(
    results: Sequence[tuple[float | None, float | None]], weights: Sequence[float]
) -> tuple[float | None, float | None]:
    """The weighted mean of independent values with its standard error. With equal weights it is the
    harness's mean of a group's tasks.
    """
    if len(results) == 1:
        return results[0]
    values = [value for value, _ in results if value is not None]
    errors = [error for _, error in results if error is not None]
    if not results or len(values) < len(results):
        return None, None
    total = math.fsum(weights)
    stderr = (
        math.hypot(*map(math.prod, zip(weights, errors, strict=True))) / total
        if len(errors) == len(results)
        else None
    )
    return math.fsum(map(math.prod, zip(weights, values, strict=True))) / total, stderr


def _pairs(part: Sequence[ScoredTask], key: Key, frozen: Frozen) -> list[tuple[float, float]]:
    """The scores of the unedited and of the edited model, of the items that have both."""
    pairs: list[tuple[float, float]] = []
    for scored in part:
        before = frozen.get(frozen_name(scored, key))
        if before is not None and key in scored.numbers:
            pairs += zip(before.tolist(), scored.in_order(key), strict=True)
    return [pair for pair in pairs if not any(map(math.isnan, pair))]


def _compare(
    parts: Sequence[Sequence[ScoredTask]],
    pairs: Sequence[Sequence[tuple[float, float]]],
    key: Key,
    pooled: Mapping[str, bool],
) -> Comparison:
    """Item by item if the value is a mean over items; otherwise the comparison of the values."""
    rules = [_rule(part, key) for part in parts]
    sides = [([old for old, _ in of_part], [new for _, new in of_part]) for of_part in pairs]
    if len(parts) == 1 and is_mean(rules[0]):
        return compare(*sides[0])
    return compare_aggregates(
        [
            Part(
                before=before,
                after=after,
                rule=None if is_mean(rule) else rule,
                weight=_weight(part, key, pooled),
            )
            for part, rule, (before, after) in zip(parts, rules, sides, strict=True)
            if before
        ]
    )


def _version(given: Any) -> float | None:
    """The version as a number, 1 instead of 1.0; None if the task has no numeric version."""
    try:
        number = float(given)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else number
