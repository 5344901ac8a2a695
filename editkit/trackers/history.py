"""From records to the rows of a W&B history: one row a step, with named values. The tracker and
`push` share it.

Names: `edit/...` of a step, `weights/<metric>/<view>` over all edited matrices,
`modules/<module>/<metric>` of one matrix (and the view, if it is a restrained one),
`editing/<protocol>/<metric>/<view>`, `downstream/<suite>/<task>/<metric>/<view>`, `language/...`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from editkit.types import EVAL_FIELDS, EvalRecord, SampleRecord, StepRecord

STEP, EDITS = "edit/step", "edit/edits"
# How the figures of several matrices are combined.
SUMMED: Mapping[str, Callable[[list[float]], float]] = {"condition_number": max, "l1_norm": sum}


class History:
    """Makes the row of each step. It keeps the weights of the current step only, which arrive
    matrix by matrix.
    """

    def __init__(self, *, trajectory: str, edits: int = 0) -> None:
        """`trajectory` is the name of the trajectory's own view; `edits` is the number of edits
        made before.
        """
        self._trajectory = trajectory
        self._edits = edits
        self._weights: dict[tuple[str, str], list[float]] = {}  # by view and metric

    def step(self, record: StepRecord) -> dict[str, float]:
        """The values of a step."""
        self._weights.clear()
        self._edits += len(record.requests)
        row: dict[str, float] = {STEP: record.step, EDITS: self._edits}
        if record.requests:
            row["edit/seconds"] = sum(record.seconds.values())
        row |= {f"edit/seconds_{phase}": seconds for phase, seconds in record.seconds.items()}
        row |= {f"edit/{name}": value for name, value in record.target.items() if name != "step"}
        if record.nonfinite is not None:
            row["edit/nonfinite"] = 1
        for module, figures in record.modules.items():
            row |= {f"modules/{_path(module)}/{name}": value for name, value in figures.items()}
            for name, value in figures.items():
                row |= self._over_matrices(self._trajectory, name, value)
        return row

    def evaluation(self, record: EvalRecord) -> dict[str, float]:
        """The values of a measurement, for the row of its step."""
        value = math.nan if record.measurement.value is None else record.measurement.value
        row: dict[str, float] = {STEP: record.step}
        if record.measurement.kind == "weights":
            row[
                f"modules/{_path(str(record.measurement.task))}/{record.measurement.metric}/{record.view}"
            ] = value
            return row | self._over_matrices(record.view, record.measurement.metric, value)
        # The timing of tasks and perplexity says whether the run uses rollback. Their lines begin
        # at step 0 either way.
        timing = (
            record.measurement.timing
            if record.measurement.kind == "editing"
            and record.measurement.timing not in ("before", "milestone")
            else None
        )
        parts = (
            record.measurement.kind,
            record.measurement.protocol,
            record.measurement.suite,
            record.measurement.task,
            record.measurement.metric,
            *_more(record),
            timing,
            record.view,
        )
        return row | {"/".join(part for part in parts if part): value}

    def _over_matrices(self, view: str, metric: str, value: float) -> dict[str, float]:
        if metric not in SUMMED:
            return {}
        found = self._weights.setdefault((view, metric), [])
        found.append(value)
        is_finite = not any(math.isnan(each) for each in found)
        return {f"weights/{metric}/{view}": SUMMED[metric](found) if is_finite else math.nan}


def rows(
    steps: Iterable[StepRecord], evals: Iterable[EvalRecord], *, trajectory: str
) -> dict[int, dict[str, float]]:
    """The whole history of a run, by step."""
    evals = tuple(evals)
    history = History(trajectory=trajectory)
    by_step: dict[int, list[EvalRecord]] = {}
    for record in evals:
        by_step.setdefault(record.step, []).append(record)
    found: dict[int, dict[str, float]] = {}
    for step in steps:
        found[step.step] = history.step(step)
        for record in by_step.get(step.step, ()):
            found[step.step] |= history.evaluation(record)
    return found


def evaluation_table(evals: Iterable[EvalRecord]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of a table of all measurements, without empty columns."""
    names = list(EVAL_FIELDS)
    values = [[_scalar(value) for value in record.flat().values()] for record in evals]
    filled = [
        place
        for place, name in enumerate(names)
        if name == "value" or any(row[place] is not None for row in values)
    ]
    return [names[place] for place in filled], [[row[place] for place in filled] for row in values]


def sample_table(
    rows: Iterable[Mapping[str, Any]], limit: int
) -> tuple[list[str], list[list[Any]]]:
    """Columns and the first `limit` rows of a table of samples. Nested values are written as
    JSON.
    """
    first = [row for row, _ in zip(rows, range(limit), strict=False)]
    columns = list(dict.fromkeys(name for row in first for name in row))
    kinds = {
        name: {type(_scalar(row.get(name))) for row in first} - {type(None)} for name in columns
    }
    mixed = {
        name for name, types in kinds.items() if len(types) > 1 and not types <= {int, float}
    }  # W&B wants one type a column
    return columns, [
        [_text(row.get(name)) if name in mixed else _scalar(row.get(name)) for name in columns]
        for row in first
    ]


def sample_key(record: SampleRecord) -> str:
    """The name of a table of samples."""
    return f"samples/{record.name}/{record.view}"


def _more(record: EvalRecord) -> tuple[str | None, ...]:
    """Further fields in which two measurements of one name may differ."""
    return record.measurement.block, record.measurement.subset, record.measurement.variant


def _path(module: str) -> str:
    """The module's name with slashes: W&B reads a dot in a name as nesting."""
    return module.replace(".", "/")


def _scalar(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _text(value: Any) -> str | None:
    return (
        value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )
