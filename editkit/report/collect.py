"""`editkit collect`: the measurements of many runs as one tidy table, one line each."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError, message
from editkit.files import write_atomically
from editkit.records.reader import RunRecords
from editkit.report.compare.subjects import Measured, measured
from editkit.report.tables import edits_by_step
from editkit.types import EVAL_FIELDS

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
RENAMED = {
    "dataset": "dataset_digest",
    "requests": "requests_digest",
}  # the label `dataset` has that name
COLUMNS = (*LABELS, "edits", *(RENAMED.get(name, name) for name in FIELDS))


def collect(runs: Iterable[RunRecords], *, every_step: bool = False) -> pandas.DataFrame:
    """All measurements of all runs, without averaging. The columns are `COLUMNS`; a number that is
    not finite is missing (<NA>).

    The weights of the trajectory come from the step records. They are lines of the kind "weights"
    with the matrix as the task, like those of restrained views: at measured steps, or at every step
    with `every_step`. Lines of the kind "edit" hold the figures of the target search and the
    seconds.
    """
    import pandas

    subjects, _ = measured(runs)
    lines = [line for each in subjects for line in _lines(each, every_step=every_step)]
    return pandas.DataFrame.from_records(lines, columns=list(COLUMNS)).convert_dtypes()


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


def _lines(each: Measured, *, every_step: bool) -> Iterator[tuple[Any, ...]]:
    run = each.run
    names = _names(each)
    edits = edits_by_step(run.steps)
    evals = [record for record in run.evals if record.view == each.view]
    for record in evals:
        values = record.flat()
        yield (*names, edits.get(record.step, record.step), *_row(values))
    if not each.is_trajectory:
        return  # the steps are the trajectory's
    milestones = {record.step for record in evals}
    for step in run.steps:
        if every_step or step.step in milestones or not evals:
            for name, number in {
                **step.target,
                **{f"seconds_{phase}": seconds for phase, seconds in step.seconds.items()},
            }.items():
                yield (
                    *names,
                    edits[step.step],
                    *_row(
                        {"step": step.step, "kind": "edit", "metric": name, "value": number, "n": 1}
                    ),
                )
            for module, figures in step.modules.items():
                for name, number in figures.items():
                    values = {
                        "step": step.step,
                        "kind": "weights",
                        "metric": name,
                        "task": module,
                        "value": number,
                        "n": 1,
                    }
                    yield (*names, edits[step.step], *_row(values))


def _names(each: Measured) -> tuple[Any, ...]:
    folder = each.run.folder
    experiment = each.run.config.get("experiment_name") or folder.parent.parent.name
    values = (
        experiment,
        folder.parent.name,
        each.seed,
        each.run.status,
        each.model,
        each.editor,
        each.restraint,
        each.options,
    )
    return (*values, each.dataset, each.subject, each.view, str(folder))


def _row(values: dict[str, Any]) -> Sequence[Any]:
    number = values.get("value")
    values["value"] = math.nan if number is None else float(number)
    return [values.get(name) for name in FIELDS]
