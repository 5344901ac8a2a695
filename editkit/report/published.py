"""The papers' numbers beside the measured ones.

`experiments/<paper>/published.csv` holds a number a line: where it is from (source, table, row, value), and what was measured there (model,
editor, restraint, dataset, edits, metric, protocol). `preset` says which experiment here repeats it: its runs are named after it, with
`-tiny` behind where a bundled model stands in for the paper's (`scale=tiny`); those show the effect, not the number.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from editkit.errors import ConfigError
from editkit.report.measured import Measured
from editkit.report.panels import weights_by_edits
from editkit.report.summary import SECONDS, Mean, seconds_an_edit
from editkit.report.tables import edits_by_step, is_summarised

TINY = "-tiny"  # behind the name of a preset's runs at scale=tiny
STANDS_FOR = {"tiny-gpt2": "gpt2", "tiny-gptj": "gptj", "tiny-llama": "llama"}  # the bundled models' architectures
AVERAGED = ("efficacy", "generalization", "locality")  # D4S's Avg
PERCENT = ("%", "percent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One number of a paper; the fields are the columns of `published.csv`."""

    preset: str  # "d4s/table2_gptj"; empty where no experiment repeats it
    source: str
    table: str
    row: str
    value: float
    unit: str  # "%", "s" or empty
    model: str
    editor: str
    restraint: str
    dataset: str
    edits: int | None
    metric: str  # as in evals.jsonl, or total_sigma_max, l1_growth, seconds, average, or a task's name
    protocol: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """A published number and what the runs give for it; `measured` is None where no run has it."""

    published: Published
    measured: Mean | None
    model: str
    edits: int | None  # what was measured; a stand-in's may differ
    is_stand_in: bool


def experiments_folder() -> Path | None:
    """Where the papers' folders are: beside the package in a checkout, inside it when it was installed from a wheel."""
    package = Path(__file__).resolve().parent.parent
    return next((folder for folder in (package / "experiments", package.parent / "experiments") if folder.is_dir()), None)


def load_published(files: Iterable[Path] | None = None) -> tuple[Published, ...]:
    """The numbers of all papers' folders, or of these files. Raises ConfigError with every line that cannot be read."""
    folder = experiments_folder()
    paths = list(files) if files is not None else sorted(folder.glob("*/published.csv")) if folder else []
    found, problems = [], []
    names = [field.name for field in fields(Published)]
    for path in paths:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if missing := [name for name in names if name not in (reader.fieldnames or ())]:
                problems.append(f"{path}: without the columns {', '.join(missing)}.")
                continue
            for number, line in enumerate(reader, start=2):
                try:
                    found.append(_published({name: line[name] or "" for name in names}))
                except (ValueError, TypeError) as error:
                    problems.append(f"{path}:{number}: {error}")
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def beside(subjects: Sequence[Measured], published: Sequence[Published]) -> tuple[Beside, ...]:
    """Every published number of the presets that are among the runs."""
    found = []
    for preset in dict.fromkeys(row.preset for row in published if row.preset):
        name = preset.replace("/", "-")
        runs = {each.run.config.get("experiment_name") for each in subjects}
        rows = [row for row in published if row.preset == preset]
        for given in (name, name + TINY):
            if given in runs:
                here = [each for each in subjects if each.run.config.get("experiment_name") == given]
                found += [_beside(row, here, rows, is_stand_in=given.endswith(TINY)) for row in rows]
    return tuple(found)


def _beside(row: Published, here: Sequence[Measured], rows: Sequence[Published], *, is_stand_in: bool) -> Beside:
    alike = [each for each in here if (each.editor, each.restraint) == (row.editor, row.restraint) and _is_model(each.model, row.model)]
    if not is_stand_in:
        alike = [each for each in alike if each.dataset == row.dataset or not row.dataset]
    first = alike[:1]
    subject = first[0].subject if first else ""
    edits = _edits(row, rows, first[0], is_stand_in=is_stand_in) if first else row.edits
    if edits is None and row.edits is not None:
        alike = []
    values = [value for each in alike if each.subject == subject if (value := _value(each, row, edits)) is not None]
    scale = 0.01 if row.unit == "%" else 1.0
    return Beside(
        published=row,
        measured=Mean(values=tuple(value / scale if row.unit == "%" else value for value in values)) if values else None,
        model=first[0].model if first else "",
        edits=edits,
        is_stand_in=is_stand_in,
    )


def _is_model(name: str, published: str) -> bool:
    family = STANDS_FOR.get(name)
    return name == published or not published or (family is not None and published.startswith(family))


def _edits(row: Published, rows: Sequence[Published], each: Measured, *, is_stand_in: bool) -> int | None:
    """Where to look: at the published number of edits or within 1 % of it; a stand-in's at the milestone of the same place."""
    measured = sorted(edits for edits in {*(each.run.config.get("milestones") or ())} if edits)
    if not row.edits or row.edits in measured:
        return row.edits
    near = [edits for edits in measured if abs(edits - row.edits) <= 0.01 * row.edits]
    if near or not is_stand_in:
        return near[0] if near else None
    published = sorted({other.edits for other in rows if other.edits})
    return measured[published.index(row.edits)] if len(measured) == len(published) else None


def _value(each: Measured, row: Published, edits: int | None) -> float | None:
    """What one run gives for a published number; fractions as fractions, nan where it was not finite."""
    steps = edits_by_step(each.run.steps)
    last = max(steps.values(), default=0)
    at = last if edits is None else edits
    if row.metric == "seconds":
        return seconds_an_edit(each, at, steps)
    if row.metric == "total_sigma_max":
        return weights_by_edits(each, row.metric, max).get(at)
    if row.metric == "l1_growth":
        norms = weights_by_edits(each, "l1_norm", sum)
        return norms[at] / norms[0] - 1 if at in norms and 0 in norms else None
    found: dict[str, float] = {}
    for record in each.run.evals:
        if record.view == each.view and is_summarised(record) and steps.get(record.step, record.step) == at:
            if record.kind == "editing" and row.protocol not in ("", record.protocol):
                continue
            name = record.metric if record.kind == "editing" else str(record.task)
            found.setdefault(name, math.nan if record.value is None else record.value)
    if row.metric == "average":
        return sum(found[name] for name in AVERAGED) / len(AVERAGED) if all(name in found for name in AVERAGED) else None
    return found.get(row.metric)


def _published(line: Mapping[str, str]) -> Published:
    if not line["source"] or not line["table"] or not line["row"]:
        raise ValueError("source, table and row are needed")
    return Published(
        **{
            **line,
            "value": float(line["value"]),
            "edits": int(line["edits"]) if line["edits"] else None,
        }  # type: ignore[arg-type]
    )


__all__ = ["SECONDS", "Beside", "Published", "beside", "experiments_folder", "load_published"]
