"""The files of a run's folder as frozen values. Reading them needs no model."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from editkit.errors import ConfigError, message
from editkit.records import lookup
from editkit.records.views import trajectory_view_of
from editkit.types import EvalRecord, Measurement, StepRecord

A_RUN = "the folder of one run, outputs/.../seed<k>, with steps.jsonl and evals.jsonl"
_Record = TypeVar("_Record", StepRecord, EvalRecord)


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """The records that a run has written so far."""

    folder: Path
    steps: tuple[StepRecord, ...]
    evals: tuple[EvalRecord, ...]
    config: Mapping[str, Any]  # resolved; empty if the run has not written it
    provenance: Mapping[str, Any]
    # "foreign": the results of another program (`editkit.records.foreign`)
    status: Literal["done", "failed", "unfinished", "foreign"]
    failure: Mapping[str, Any] | None = None  # FAILED.json

    @property
    def is_foreign(self) -> bool:
        """Whether another program measured it. It is not known whether its edits add up."""
        return self.status == "foreign"

    @property
    def trajectory_view(self) -> str:
        """The name of the trajectory's own view, also before anything was measured."""
        return trajectory_view_of(self.config)

    @property
    def views(self) -> tuple[str, ...]:
        """The trajectory's own view first. A run without measurements has that one alone."""
        return tuple(dict.fromkeys((self.trajectory_view, *(record.view for record in self.evals))))

    def find(self, **facts: object) -> tuple[EvalRecord, ...]:
        """The evaluations whose fields have these values, in their order.

        Args:
            facts: by the keys of a line of `evals.jsonl`: step, view, metric, protocol, timing, ...

        Raises:
            ConfigError: a key is unknown.
        """
        return lookup.find(self.evals, facts)

    def value(self, **facts: object) -> float | None:
        """The value of the one evaluation with these facts; None if it is not finite.

        `block`, `subset` and `task` are None unless they are among the facts.

        Raises:
            ConfigError: a key is unknown, or no or several evaluations have these facts. The
                message names the values that exist, or the keys in which the evaluations differ.
        """
        return lookup.value(self.evals, facts)


def load_run(folder: Path) -> RunRecords:
    """The records of a run's folder. The run may still be writing: an incomplete last line is left
    out.

    Numbers that were not finite (null, or NaN) are nan in step records and None in evaluations.

    Raises:
        ConfigError: the folder is not that of a run, or lines are malformed. All problems are
            reported together, with file, line and field.
    """
    if not folder.is_dir():
        raise ConfigError(message(str(folder), "not a folder", expected=A_RUN))
    if not (folder / "steps.jsonl").exists():
        inside = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        problem = "no run's folder, as it has no steps.jsonl"
        raise ConfigError(message(str(folder), problem, got=inside, expected=A_RUN))
    problems: list[str] = []
    steps = tuple(_records(folder / "steps.jsonl", _step, problems))
    evals = tuple(_records(folder / "evals.jsonl", _evaluation, problems))
    config = _mapping(folder / "config.yaml", problems)
    provenance = _mapping(folder / "provenance.json", problems)
    failure = _mapping(folder / "FAILED.json", problems)
    if problems:
        raise ConfigError(problems)
    done = (folder / "DONE").exists()
    return RunRecords(
        folder=folder,
        steps=steps,
        evals=evals,
        config=config,
        provenance=provenance,
        status="done" if done else "failed" if failure else "unfinished",
        failure=failure or None,
    )


def _records(
    path: Path, parse: Callable[[dict[str, Any]], _Record], problems: list[str]
) -> Iterator[_Record]:
    if not path.exists():
        return
    # A part after the last line end is still being written.
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError(f"{type(fields).__name__} instead of a JSON object")
            yield parse(fields)
        # JSONDecodeError and UnicodeDecodeError are ValueErrors.
        except (ValueError, TypeError) as error:
            got = line[:80].decode(errors="replace")
            problem = f"malformed record, {error}"
            problems.append(message(f"{path}:{number}", problem, got=got))


def _step(fields: dict[str, Any]) -> StepRecord:
    known = _known(StepRecord, fields)
    known["requests"] = tuple(known.get("requests", ()))
    for name in ("seconds", "target"):
        known[name] = _numbers(name, known.get(name, {}))
    modules = known.get("modules", {})
    known["modules"] = {
        sys.intern(module): _numbers(f"modules.{module}", figures)
        for module, figures in modules.items()
    }
    if known.get("side") is not None:
        known["side"] = _numbers("side", known["side"])
    return StepRecord(**known)


def _evaluation(fields: dict[str, Any]) -> EvalRecord:
    known = _known(EvalRecord, fields)
    for name in ("value", "stderr", *(name for name in ("low", "high") if name in known)):
        number = known.get(name)
        if number is not None and not isinstance(number, int | float):
            raise ValueError(f"{name} is {number!r}, not a number")
        known[name] = float(number) if number is not None and math.isfinite(number) else None
    return EvalRecord.from_flat(known)


def _known(record: type[_Record], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that this version knows. Later versions may write more."""
    names, required = _names(are_flat=record is EvalRecord)
    if missing := [name for name in required if name not in fields]:
        raise ValueError(f"without {', '.join(missing)}")
    if not isinstance(fields["step"], int):
        raise ValueError(f"step is {fields['step']!r}, not a whole number")
    return {name: value for name, value in fields.items() if name in names}


@functools.cache  # asked for every line
def _names(*, are_flat: bool) -> tuple[frozenset[str], tuple[str, ...]]:
    """The names of the fields of evaluations, whose lines are flat, or of steps; and of those that
    no line may lack.
    """
    fields_of = list(dataclasses.fields(EvalRecord if are_flat else StepRecord))
    if are_flat:
        fields_of += dataclasses.fields(Measurement)
    names = frozenset(field.name for field in fields_of) - {"measurement"}
    required = [
        field.name
        for field in fields_of
        if _is_required(field) and field.name in names - {"value", "stderr"}
    ]
    return names, tuple(required)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _numbers(where: str, fields: Any) -> dict[str, float]:
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is {fields!r}, not a JSON object")
    if wrong := [
        name
        for name, value in fields.items()
        if value is not None and not isinstance(value, int | float)
    ]:
        raise ValueError(f"{where}.{wrong[0]} is {fields[wrong[0]]!r}, not a number")
    # A long run has the same names in every line: one text for all of them.
    return {
        sys.intern(name): math.nan if value is None else value for name, value in fields.items()
    }


def _mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    import yaml

    try:
        content = (
            json.loads(path.read_bytes())
            if path.suffix == ".json"
            else yaml.safe_load(path.read_bytes())
        )
    except (ValueError, yaml.YAMLError) as error:
        got = " ".join(str(error).split())
        problems.append(message(str(path), "cannot be read", got=got))
        return {}
    if not isinstance(content, dict):
        got = type(content).__name__
        problems.append(message(str(path), "not names and values", got=got))
        return {}
    return content
