"""The columns of a run's summary: their keys, order and titles, and what they must not mix."""

from __future__ import annotations

from collections.abc import Sequence

from editkit.errors import ConfigError
from editkit.types import EvalRecord

EDITING_ORDER = ("efficacy", "generalization", "locality", "portability", "score")
TEXT_METRICS = ("fluency_bits", "consistency")
TITLES = {"fluency_bits": "fluency (bits)"}  # of metrics whose column has another title
Key = tuple[str, str, str, str]  # kind, suite, task, metric


def key_of(record: EvalRecord) -> Key:
    """The column of a record."""
    return (
        record.measurement.kind,
        record.measurement.suite or "",
        record.measurement.task or "",
        record.measurement.metric,
    )


def place_of(key: Key) -> tuple[int, int]:
    """The order of the columns: editing metrics, generated texts, tasks, language."""
    kind, _, _, metric = key
    kinds = ("editing", "downstream", "language")
    order = EDITING_ORDER.index(metric) if metric in EDITING_ORDER else len(EDITING_ORDER) - 1
    if metric in TEXT_METRICS:
        order = len(EDITING_ORDER)
    return kinds.index(kind) if kind in kinds else len(kinds), order if kind == "editing" else 0


def headlines(keys: Sequence[Key]) -> list[Key]:
    """The keys without the second and later metrics of each task."""
    first = {key[:3]: key for key in reversed(keys)}
    return [key for key in keys if key[0] == "editing" or first[key[:3]] == key]


def title_of(key: Key, keys: Sequence[Key]) -> str:
    """The shortest name that no other column has: the task, if necessary with suite and metric."""
    kind, suite, task, metric = key
    if not task:
        return TITLES.get(metric, metric)
    of_task = [other for other in keys if other[2] == task]
    named_suite = f"{suite}/{task}" if suite and len({other[1] for other in of_task}) > 1 else task
    return (
        f"{named_suite} {metric}"
        if kind == "editing" or len({other[3] for other in of_task}) > 1
        else named_suite
    )


def check_unmixed(name: str, records: Sequence[EvalRecord]) -> None:
    """Raises ConfigError if the records of a column mix protocols, timings or task versions, or
    have two numbers for one view and step.
    """
    for field in (
        "protocol",
        "task_version",
        "shots",
        "aggregation",
        "context",
        "max_new_tokens",
        "max_tokens",
        "dataset",
    ):
        values = list(
            dict.fromkeys(
                getattr(record.measurement, field) if field != "dataset" else record.dataset
                for record in records
            )
        )
        if field == "shots":
            # None: old records, and groups of tasks
            values = [value for value in values if value is not None]
        if len(values) > 1:
            given = ", ".join(str(value) for value in values)
            raise ConfigError(
                f"one column of the table would mix values of {field}: '{name}' was measured with "
                f"{given}. Choose one of them."
            )
    if {"milestone", "rollback"} <= {record.measurement.timing for record in records}:
        raise ConfigError(
            "one column of the table would mix edits that add up with edits that were taken "
            f"back: '{name}'. Choose one of them."
        )
    seen: set[tuple[str, int]] = set()
    for record in records:
        place = (record.view, record.step)
        if place in seen:
            raise ConfigError(
                f"'{name}' was measured twice for view '{record.view}' at step {record.step}: the "
                "table cannot say which one counts."
            )
        seen.add(place)
