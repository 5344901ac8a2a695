"""Evaluations looked up by the fields that tell them apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from editkit.errors import ConfigError, message
from editkit.types import EVAL_FIELDS, EvalRecord, Measurement

# None unless they are given: the measurement is of all requests and all kinds of their prompts.
WHOLE = {"block": None, "subset": None, "task": None}
# Fields that tell no measurements apart.
NUMBERS = ("value", "stderr", "n", "nonfinite", "low", "high", "cut")
OF_MEASUREMENTS = frozenset(field.name for field in dataclasses.fields(Measurement))
MOST_SHOWN = 12  # values of a field that a message lists


def field_of(record: EvalRecord, name: str) -> Any:
    """The value of a key of a line of `evals.jsonl`."""
    return getattr(record.measurement if name in OF_MEASUREMENTS else record, name)


def find(evals: Iterable[EvalRecord], facts: Mapping[str, object]) -> tuple[EvalRecord, ...]:
    """The evaluations whose fields have these values, in their order.

    Raises:
        ConfigError: a field is unknown.
    """
    if unknown := facts.keys() - set(EVAL_FIELDS):
        problem = f"unknown field of an evaluation: {', '.join(sorted(unknown))}"
        raise ConfigError(message("find", problem, expected=", ".join(EVAL_FIELDS)))
    return tuple(
        record
        for record in evals
        if all(field_of(record, name) == value for name, value in facts.items())
    )


def value(evals: Sequence[EvalRecord], facts: Mapping[str, object]) -> float | None:
    """The value of the one evaluation with these facts; None if it is not finite.

    Raises:
        ConfigError: a field is unknown, or no or several evaluations have these facts. The message
            names the values that exist, or the fields in which the evaluations differ.
    """
    records = find(evals, WHOLE | dict(facts))
    if len(records) == 1:
        return records[0].measurement.value
    given = ", ".join(f"{name}={given!r}" for name, given in facts.items()) or "no facts"
    if not records:
        problem = f"no evaluation with {given}"
        raise ConfigError(message("value", problem, expected=_alternatives(evals, facts)))
    differing = [
        f"{name} ({_listed(values)})"
        for name in EVAL_FIELDS
        if name not in NUMBERS and len(values := _values(records, name)) > 1
    ]
    problem = f"{len(records)} evaluations with {given}"
    fix = f"also give {' or '.join(differing)}" if differing else "read them with find()"
    raise ConfigError(message("value", problem, fix=fix))


def _alternatives(evals: Sequence[EvalRecord], facts: Mapping[str, object]) -> str:
    """The values of each fact among the evaluations that have all other facts; if there are none
    for any, the values of each fact among all evaluations.
    """
    wanted = WHOLE | dict(facts)
    others = {
        name: find(evals, {other: fact for other, fact in wanted.items() if other != name})
        for name in wanted
    }
    near = {name: records for name, records in others.items() if records}
    fields = near or dict.fromkeys(facts, tuple(evals))
    return "; ".join(f"{name}: {_listed(_values(of, name))}" for name, of in fields.items())


def _values(records: Iterable[EvalRecord], name: str) -> list[Any]:
    return list(dict.fromkeys(field_of(record, name) for record in records))


def _listed(values: Sequence[Any]) -> str:
    more = f", and {len(values) - MOST_SHOWN} more" if len(values) > MOST_SHOWN else ""
    return ", ".join(map(str, values[:MOST_SHOWN])) + more if values else "none"
