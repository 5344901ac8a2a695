"""From a task's scores to measurements: values and their errors, and how they compare with the
unedited model's frozen ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editkit.evaluation.base import mean_and_stderr
from editkit.evaluation.harness.load_tasks import Chosen, examples_are_tested
from editkit.evaluation.harness.responses import Answered, Key, is_mean, rule_of, title
from editkit.evaluation.statistics.paired import (
    Comparison,
    Part,
    aggregate,
    bootstrap_stderr,
    compare,
    compare_aggregates,
)
from editkit.lazy import torch
from editkit.types import Measurement

if TYPE_CHECKING:
    Frozen = Mapping[str, torch.Tensor]


def frozen_scores(answers: Sequence[Answered]) -> dict[str, torch.Tensor]:
    """float64, (items,), by `frozen_name`; nan where a metric leaves an item out. Metrics that give
    items no number are not among them.
    """
    return {
        frozen_name(answered, key): torch.tensor(answered.in_order(key), dtype=torch.float64)
        for answered in answers
        for key in answered.numbers
    }


def frozen_name(answered: Answered, key: Key) -> str:
    return "|".join((answered.asked.name, *key))


def measurements(
    suite: str, chosen: Chosen, answers: Sequence[Answered], frozen: Frozen
) -> list[Measurement]:
    """A task's metrics; of a group that has metrics of its own, these of all its tasks.

    Args:
        frozen: the unedited model's scores; nothing is compared where there are none.
    """
    if chosen.pooled is None:
        return [
            found
            for answered in answers
            for found in _measure(suite, answered.asked.label, [answered], {}, frozen)
        ]
    return _measure(suite, chosen.name, answers, chosen.pooled, frozen)


def _measure(
    suite: str, label: str, answers: Sequence[Answered], pooled: Mapping[str, bool], frozen: Frozen
) -> list[Measurement]:
    """`pooled` is that of the group; empty for a task alone, of which all metrics are measured."""
    keys = list(
        dict.fromkeys(
            key for answered in answers for key in answered.scores if not pooled or key[0] in pooled
        )
    )
    common = _about(suite, label, answers)
    measured: list[Measurement] = []
    for key in keys:
        parts = _parts(answers, key, by_size=pooled.get(key[0], True))
        value, stderr = _mean_of(
            [_value(part, key) for part in parts], [_weight(part, key, pooled) for part in parts]
        )
        is_language = "perplexity" in key[0] or key[0].startswith("bits_per")
        name = title(key, filters=len({filter_name for _, filter_name in keys}))
        kind = "language" if is_language else "downstream"
        n = sum(len(answered.scores.get(key, {})) for answered in answers)
        measured.append(
            Measurement(kind=kind, metric=name, value=value, stderr=stderr, n=n, **common)
        )
        pairs = [_pairs(part, key, frozen) for part in parts]
        if any(pairs):
            found = _compare(parts, pairs, key, pooled)
            figures = {
                "difference": (found.difference, found.stderr),
                "p_value": (found.p_value, None),
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


def _about(suite: str, label: str, answers: Sequence[Answered]) -> dict[str, Any]:
    """What all records of a task or a group say beside the number."""
    task = answers[0].asked.task
    metadata = task.config.metadata or {}
    shots = {answered.asked.task.config.num_fewshot for answered in answers}
    given = any(shots) and any(examples_are_tested(answered.asked.task) for answered in answers)
    oddities = [
        metadata.get("variant"),
        "examples are taken from the tested records" if given else None,
    ]
    return {
        "suite": suite,
        "task": label,
        "task_version": _version(metadata.get("version")),
        "shots": shots.pop() if len(shots) == 1 else None,
        "nonfinite": sum(len(answered.nonfinite) for answered in answers),
        "cut": sum(tokens > 0 for answered in answers for tokens in answered.asked.cut.values())
        or None,
        "variant": "; ".join(each for each in oddities if each) or None,
    }


def _parts(answers: Sequence[Answered], key: Key, *, by_size: bool) -> list[list[Answered]]:
    """What has a value of its own: a task; but all tasks together where every item counts the
    same.
    """
    having = [answered for answered in answers if answered.scores.get(key)]
    if having and by_size and all(is_mean(_rule([answered], key)) for answered in having):
        return [having]
    return [[answered] for answered in having]


def _rule(part: Sequence[Answered], key: Key) -> Callable[[list[Any]], float]:
    return rule_of(part[0].asked.task, key[0])


def _weight(part: Sequence[Answered], key: Key, pooled: Mapping[str, bool]) -> float:
    return sum(len(answered.scores[key]) for answered in part) if pooled.get(key[0], True) else 1


def _value(part: Sequence[Answered], key: Key) -> tuple[float | None, float | None]:
    """The metric's value by the task's own rule, and its standard error: a mean's own, otherwise
    the bootstrap's.
    """
    from lm_eval.api.metrics import mean

    values = [value for answered in part for value in answered.scores[key].values()]
    rule = _rule(part, key)
    if any(value is None for value in values):
        return None, None
    if rule is mean:
        return mean_and_stderr([float(value) for value in values])
    value = aggregate(rule, values)
    return (value, bootstrap_stderr(values, rule)) if math.isfinite(value) else (None, None)


def _mean_of(
    found: Sequence[tuple[float | None, float | None]], weights: Sequence[float]
) -> tuple[float | None, float | None]:
    """Of independent values; without weights it is the harness's mean of a group's tasks, with its
    standard error.
    """
    if len(found) == 1:
        return found[0]
    values, errors = (
        [value for value, _ in found if value is not None],
        [error for _, error in found if error is not None],
    )
    if not found or len(values) < len(found):
        return None, None
    total = math.fsum(weights)
    stderr = (
        math.hypot(*map(math.prod, zip(weights, errors, strict=True))) / total
        if len(errors) == len(found)
        else None
    )
    return math.fsum(map(math.prod, zip(weights, values, strict=True))) / total, stderr


def _pairs(part: Sequence[Answered], key: Key, frozen: Frozen) -> list[tuple[float, float]]:
    """The unedited model's score and the edited one's for each item that has both."""
    pairs: list[tuple[float, float]] = []
    for answered in part:
        before = frozen.get(frozen_name(answered, key))
        if before is not None and key in answered.numbers:
            pairs += zip(before.tolist(), answered.in_order(key), strict=True)
    return [pair for pair in pairs if not any(map(math.isnan, pair))]


def _compare(
    parts: Sequence[Sequence[Answered]],
    pairs: Sequence[Sequence[tuple[float, float]]],
    key: Key,
    pooled: Mapping[str, bool],
) -> Comparison:
    """Item by item where the value is a mean over items; otherwise the values themselves."""
    rules = [_rule(part, key) for part in parts]
    sides = [([old for old, _ in each], [new for _, new in each]) for each in pairs]
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
    """1 rather than 1.0; None where a task has no number for it."""
    try:
        number = float(given)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else number
