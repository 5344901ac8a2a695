"""The papers' numbers: the content of `experiments/<paper>/published.csv`, one number a line.

A line says where its number is from (source, table, row, value) and what was measured there (model,
editor, restraint, dataset, edits, metric, protocol, options). `preset` says which experiment here
repeats it. `note` says what a reader has to know to compare the two, and `not_measured` why no run
can have the number.

A metric has the name under which editkit records it for that dataset: zsRE's locality is
`locality_out_of_distribution`, and a table's "specificity" is `locality` where it is agreement with
the unedited model.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from editkit.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One number of a paper; the fields are the columns of `published.csv`, of which those with a
    default may be missing.
    """

    preset: str  # "d4s/table2_gptj"; empty if no experiment repeats its table
    source: str
    table: str
    row: str
    value: float
    unit: str  # "%", "s", "edits", "bits x 100" or empty
    model: str
    editor: str
    restraint: str
    dataset: str
    edits: int | None
    # as in evals.jsonl, or total_sigma_max, l1_growth, seconds, average, effective_edits, or a
    # task's name
    metric: str
    protocol: str
    options: str = ""  # of the run that has the number: "editor.objective=prompt_last"
    not_measured: str = ""  # why no run can have the number; empty: runs can
    note: str = ""

    @property
    def wanted(self) -> dict[str, str]:
        """The values that a run's configuration must have, by dotted key."""
        return dict(option.split("=", 1) for option in self.options.split())


NAMES = tuple(field.name for field in fields(Published))
NEEDED = tuple(field.name for field in fields(Published) if field.default is MISSING)


def experiments_folder() -> Path | None:
    """Where the papers' folders are: beside the package in a checkout, inside it when it was
    installed from a wheel.
    """
    package = Path(__file__).resolve().parent.parent.parent
    return next(
        (
            folder
            for folder in (package / "experiments", package.parent / "experiments")
            if folder.is_dir()
        ),
        None,
    )


def load_published(files: Iterable[Path] | None = None) -> tuple[Published, ...]:
    """The numbers of all papers' folders, or of these files. Raises ConfigError with every file and
    every line that cannot be read.
    """
    folder = experiments_folder()
    paths = (
        list(files)
        if files is not None
        else sorted(folder.glob("*/published.csv"))
        if folder
        else []
    )
    problems: list[str] = []
    rows = [row for path in paths for row in _read(path, problems)]
    if problems:
        raise ConfigError(problems)
    return tuple(rows)


def _read(path: Path, problems: list[str]) -> Iterator[Published]:
    try:
        with open(
            path, newline="", encoding="utf-8-sig"
        ) as file:  # -sig: spreadsheets begin their files with a mark
            reader = csv.DictReader(file)
            if missing := [name for name in NEEDED if name not in (reader.fieldnames or ())]:
                problems.append(f"{path}: without the columns {', '.join(missing)}.")
                return
            for line in reader:
                try:
                    yield _published(line)
                except ValueError as error:
                    problems.append(f"{path}:{reader.line_num}: {error}.")
    except OSError as error:
        problems.append(f"{path} cannot be read ({error.strerror}).")
    except UnicodeDecodeError as error:
        problems.append(f"{path} cannot be read: it is no text in UTF-8 ({error.reason}).")
    except csv.Error as error:
        problems.append(f"{path} cannot be read as comma-separated values ({error}).")


def _published(line: Mapping[str | None, str | None]) -> Published:
    """Raises ValueError for a malformed line."""
    if None in line:
        raise ValueError("more values than columns (a value with a comma in it needs quotes)")
    texts = {name: (line.get(name) or "").strip() for name in NAMES}
    if empty := [name for name in ("source", "table", "row", "metric") if not texts[name]]:
        raise ValueError(f"{', '.join(empty)}: empty, but needed")
    value, edits = _number(texts["value"]), texts["edits"]
    if value is None:
        raise ValueError(f"value: {texts['value']!r} is no number")
    if edits and not edits.isdecimal():
        raise ValueError(f"edits: {edits!r} is no whole number")
    if wrong := [option for option in texts["options"].split() if "=" not in option]:
        raise ValueError(f"options: {wrong[0]!r} is not key=value")
    return Published(**texts | {"value": value, "edits": int(edits) if edits else None})  # type: ignore[arg-type]


def _number(text: str) -> float | None:
    try:
        return number if math.isfinite(number := float(text)) else None
    except ValueError:
        return None
