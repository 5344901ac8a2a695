"""From a task's scores to measurements: means and their errors, and how they compare with the unedited model's frozen ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editkit.evaluation.answers import Answered, Key, title
from editkit.evaluation.base import Measurement, mean_and_stderr
from editkit.evaluation.loading import Chosen
from editkit.evaluation.paired import bootstrap_stderr, compare
from editkit.lazy import torch

if TYPE_CHECKING:
    Frozen = Mapping[str, torch.Tensor]


def frozen_scores(answers: Sequence[Answered]) -> dict[str, torch.Tensor]:
    """float64, (items,), by `frozen_name`; nan where a metric leaves an item out. Metrics that give items no number are not among them."""
    return {
        frozen_name(answered, key): torch.tensor(answered.in_order(key), dtype=torch.float64)
        for answered in answers
        for key in answered.numbers
    }


def frozen_name(answered: Answered, key: Key) -> str:
    return "|".join((answered.asked.name, *key))


def measurements(suite: str, chosen: Chosen, answers: Sequence[Answered], frozen: Frozen) -> list[Measurement]:
    """A task's metrics; of a group that has metrics of its own, these over all its tasks' items.

    Args:
        frozen: the unedited model's scores; nothing is compared where there are none.
    """
    if chosen.pooled is None:
        return [found for answered in answers for found in _measure(suite, answered.asked.label, [answered], None, frozen)]
    return _measure(suite, chosen.name, answers, chosen.pooled, frozen)


def _measure(suite: str, label: str, answers: Sequence[Answered], only: Sequence[str] | None, frozen: Frozen) -> list[Measurement]:
    task = answers[0].asked.task
    metadata = task.config.metadata or {}
    keys = [key for key in answers[0].scores if only is None or key[0] in only]
    common: dict[str, Any] = {
        "suite": suite,
        "task": label,
        "task_version": _version(metadata.get("version")),
        "nonfinite": sum(len(answered.nonfinite) for answered in answers),
        "cut": sum(tokens > 0 for answered in answers for tokens in answered.asked.cut.values()) or None,
        "variant": metadata.get("variant"),
    }
    measured: list[Measurement] = []
    for key in keys:
        values = [value for answered in answers for value in answered.scores.get(key, {}).values()]
        value, stderr = _aggregate(task, key[0], values)
        is_language = "perplexity" in key[0] or key[0].startswith("bits_per")
        name = title(key, filters=len({filter_name for _, filter_name in keys}))
        kind = "language" if is_language else "downstream"
        measured.append(Measurement(kind=kind, metric=name, value=value, stderr=stderr, n=len(values), **common))
        if pairs := _pairs(answers, key, frozen):
            found = compare([before for before, _ in pairs], [after for _, after in pairs])
            figures = {"difference": (found.difference, found.stderr), "p_value": (found.p_value, None)}
            measured += [
                Measurement(kind="comparison", metric=f"{name}_{what}", value=figure, stderr=error, n=len(pairs), **common)
                for what, (figure, error) in figures.items()
            ]
    return measured


def _pairs(answers: Sequence[Answered], key: Key, frozen: Frozen) -> list[tuple[float, float]]:
    """The unedited model's score and the edited one's for each item that has both."""
    pairs: list[tuple[float, float]] = []
    for answered in answers:
        before = frozen.get(frozen_name(answered, key))
        if before is not None:
            pairs += zip(before.tolist(), answered.in_order(key), strict=True)
    return [pair for pair in pairs if not any(map(math.isnan, pair))]


def _aggregate(task: Any, metric: str, values: list[Any]) -> tuple[float | None, float | None]:
    """The metric's value by the task's own rule, and its standard error: a mean's own, otherwise the bootstrap's."""
    from lm_eval.api.metrics import mean

    if not values:
        return None, None
    rule = task.aggregation().get(metric, mean)
    if rule is mean:
        return mean_and_stderr([float(value) for value in values])
    value = float(rule(values))
    return (value, bootstrap_stderr(values, rule)) if math.isfinite(value) else (None, None)


def _version(given: Any) -> float | None:
    """1 rather than 1.0; None where a task has no number for it."""
    try:
        number = float(given)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else number
