"""The files of a run's folder as frozen values. Reading them needs no model."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from editkit.errors import ConfigError, message
from editkit.records.views import trajectory_view_of
from editkit.types import EVAL_FIELDS, EvalRecord, Measurement, StepRecord

A_RUN = "the folder of one run, outputs/.../seed<k>, with steps.jsonl and evals.jsonl"
PARTS = ("block", "subset", "task")  # fields of measurements of a part, or of a task
NUMBERS = ("value", "stderr", "n", "nonfinite", "low", "high", "cut")  # they identify nothing
_Record = TypeVar("_Record", StepRecord, EvalRecord)


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """The records that a run has written so far."""

    folder: Path
    steps: tuple[StepRecord, ...]
    evals: tuple[EvalRecord, ...]
    config: Mapping[str, Any]  # resolved; empty where the run has not written it
    provenance: Mapping[str, Any]
    status: Literal["done", "failed", "unfinished"]
    failure: Mapping[str, Any] | None = None  # FAILED.json

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
        if unknown := facts.keys() - set(EVAL_FIELDS):
            problem = f"unknown field of an evaluation: {', '.join(sorted(unknown))}"
            raise ConfigError(message("find", problem, expected=", ".join(EVAL_FIELDS)))
        lines = ((record, record.flat()) for record in self.evals)
        return tuple(
            record
            for record, line in lines
            if all(line[name] == value for name, value in facts.items())
        )

    def value(self, **facts: object) -> float | None:
        """The value of the one evaluation with these facts; None if it is not finite.

        `block`, `subset` and `task` are None unless they are among the facts.

        Raises:
            ConfigError: no evaluation has these facts, or several have; then the message names the
                fields in which they differ.
        """
        found = self.find(**dict.fromkeys(PARTS) | facts)
        if len(found) == 1:
            return found[0].measurement.value
        given = ", ".join(f"{name}={value!r}" for name, value in facts.items())
        if not found:
            metrics = sorted({record.measurement.metric for record in self.evals})
            problem = f"no evaluation with {given} in {self.folder}"
            raise ConfigError(message("value", problem, expected=f"metrics: {', '.join(metrics)}"))
        lines = [record.flat() for record in found]
        differing = [
            f"{name} ({', '.join(map(str, values))})"
            for name in EVAL_FIELDS
            if name not in NUMBERS
            and len(values := dict.fromkeys(line[name] for line in lines)) > 1
        ]
        problem = f"{len(found)} evaluations with {given}"
        raise ConfigError(message("value", problem, fix=f"also give {', '.join(differing)}"))


def load_run(folder: Path) -> RunRecords:
    """Reads a run's folder, also that of a run that is still writing: a last line without its line
    end is left out.

    Numbers that were not finite (null, or NaN) come back as nan in step records and as None in
    evaluations. Raises ConfigError for a folder that is no run's, and for malformed lines: all of
    them at once, with file, line and field.
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
    whole, _, _ = path.read_bytes().rpartition(
        b"\n"
    )  # what follows the last line end is still being written
    for number, line in enumerate(whole.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise ValueError(f"a JSON object was expected, not {type(fields).__name__}")
            yield parse(fields)
        except (
            ValueError,
            TypeError,
        ) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
            problems.append(
                f"{path}:{number}: malformed record ({error}): {line[:80].decode(errors='replace')}"
            )


def _step(fields: dict[str, Any]) -> StepRecord:
    known = _known(StepRecord, fields)
    known["requests"] = tuple(known.get("requests", ()))
    for name in ("seconds", "target"):
        known[name] = _numbers(name, known.get(name, {}))
    modules = known.get("modules", {})
    known["modules"] = {
        module: _numbers(f"modules.{module}", figures) for module, figures in modules.items()
    }
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
    """The fields that this version knows: a later one may write more."""
    fields_of = list(dataclasses.fields(record))
    if record is EvalRecord:  # its lines are flat
        fields_of += dataclasses.fields(Measurement)
    names = {field.name for field in fields_of} - {"measurement"}
    required = [
        field.name
        for field in fields_of
        if _is_required(field) and field.name in names - {"value", "stderr"}
    ]
    if missing := [name for name in required if name not in fields]:
        raise ValueError(f"without {', '.join(missing)}")
    if not isinstance(fields["step"], int):
        raise ValueError(f"step is {fields['step']!r}, not a whole number")
    return {name: value for name, value in fields.items() if name in names}


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
    return {name: math.nan if value is None else value for name, value in fields.items()}


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
        problems.append(f"{path}: cannot be read ({' '.join(str(error).split())}).")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{path}: names and values were expected, not {type(content).__name__}.")
        return {}
    return content
