"""`editkit collect`: the measurements of many runs as one tidy table, one row each."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError, message
from editkit.files import write_atomically
from editkit.records.reader import RunRecords
from editkit.report.compare.subjects import Measured, measured
from editkit.report.tables import edits_by_step
from editkit.types import EVAL_FIELDS, StepRecord

if TYPE_CHECKING:
    import pandas

LABELS = (
    "experiment",
    "run",
    "seed",
    "status",
    "model",
    "editor",
    "restraint",
    "options",
    "dataset",
    "subject",
    "view",
    "folder",
)
FIELDS = tuple(name for name in EVAL_FIELDS if name != "view")
# Fields with other names as columns. `dataset` is the name of a label.
RENAMED = {"dataset": "dataset_digest", "requests": "requests_digest"}
COLUMNS = (*LABELS, "edits", *(RENAMED.get(name, name) for name in FIELDS))


def collect(runs: Iterable[RunRecords], *, every_step: bool = False) -> pandas.DataFrame:
    """All measurements of all runs, without averaging. The columns are `COLUMNS`. A number that is
    not finite is missing (<NA>).

    The weights of the trajectory come from the step records. Their rows have the kind "weights" and
    the matrix as the task, like those of restrained views. There are rows of measured steps only,
    or of every step with `every_step`. Rows of the kind "edit" hold the numbers of the target
    search and the seconds.
    """
    import pandas

    run_views, _ = measured(runs)
    rows = [row for run_view in run_views for row in _rows(run_view, every_step=every_step)]
    return pandas.DataFrame.from_records(rows, columns=list(COLUMNS)).convert_dtypes()


def save(table: pandas.DataFrame, to: Path) -> None:
    """Writes parquet or csv by the file's suffix. Raises ConfigError for another suffix, and for
    parquet without pyarrow.
    """
    if to.suffix not in (".parquet", ".csv"):
        expected = "a name that ends in .parquet or .csv"
        raise ConfigError(message("--to", "unknown file type", got=str(to), expected=expected))
    if to.suffix == ".csv":
        write_atomically(to, table.to_csv(index=False).encode())
        return
    buffer = io.BytesIO()
    try:
        table.to_parquet(buffer, index=False)
    except ImportError:
        fix = "pip install 'editkit[report]', or choose a name that ends in .csv"
        raise ConfigError(message("--to", f"{to} needs pyarrow", fix=fix)) from None
    write_atomically(to, buffer.getvalue())


def _rows(run_view: Measured, *, every_step: bool) -> Iterator[list[Any]]:
    run = run_view.run
    labels = _labels(run_view)
    edits = edits_by_step(run.steps)
    evals = [record for record in run.evals if record.view == run_view.view]
    for record in evals:
        yield [*labels, edits.get(record.step, record.step), *_fields(record.flat())]
    if not run_view.is_trajectory:
        return  # the steps are the trajectory's
    milestones = {record.step for record in evals}
    for step in run.steps:
        if every_step or step.step in milestones or not evals:
            for values in _values_of_step(step):
                yield [*labels, edits[step.step], *_fields(values)]


def _values_of_step(step: StepRecord) -> Iterator[dict[str, Any]]:
    """The target search and the seconds of a step, then the weights of each matrix."""
    seconds = {f"seconds_{phase}": value for phase, value in step.seconds.items()}
    common = {"step": step.step, "n": 1}
    for metric, value in {**step.target, **seconds}.items():
        yield {**common, "kind": "edit", "metric": metric, "value": value}
    for module, figures in step.modules.items():
        for metric, value in figures.items():
            yield {**common, "kind": "weights", "metric": metric, "task": module, "value": value}


def _labels(run_view: Measured) -> tuple[Any, ...]:
    """The values of the columns LABELS."""
    folder = run_view.run.folder
    return (
        run_view.run.config.get("experiment_name") or folder.parent.parent.name,
        folder.parent.name,
        run_view.seed,
        run_view.run.status,
        run_view.model,
        run_view.editor,
        run_view.restraint,
        run_view.options,
        run_view.dataset,
        run_view.subject,
        run_view.view,
        str(folder),
    )


def _fields(values: dict[str, Any]) -> list[Any]:
    """The values of the columns FIELDS."""
    value = values.get("value")
    values["value"] = math.nan if value is None else float(value)
    return [values.get(name) for name in FIELDS]
