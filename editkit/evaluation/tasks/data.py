"""Where a task's records are, and what they must hold: `load` is what a task's yaml names as its
`custom_dataset`.

Local files are jsonl, json (a list), tsv (with a line of names) and MMLU's csv (without one), in
the folder `suite.data`, else $EDITKIT_DATA, or in its folder `downstream`. Where there are none the
hub is asked. Nothing here needs torch, a model or the harness.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from editkit.datasets.world import generate_world, task_items
from editkit.errors import ConfigError

DATA_FOLDER = "EDITKIT_DATA"  # environment variable: a folder that holds datasets
WORLD_ITEMS = 500  # of each of the bundled world's tasks; more would follow without end
MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")  # of its csv files
MAX_SHOWN = 5  # problems of one file that an error lists

Row = dict[str, Any]
Splits = dict[str, list[Row]]


def load(**options: Any) -> dict[str, Any]:
    """The splits as `datasets.Dataset`s, by name; `options` are those of `read`. lm-eval calls it
    with a task's metadata besides.
    """
    import datasets

    return {split: datasets.Dataset.from_list(rows) for split, rows in read(**options).items()}


def read(
    *,
    files: Mapping[str, str] | None = None,
    hub: Mapping[str, Any] | None = None,
    columns: Sequence[str] = (),
    first: int | None = None,
    quotes: bool = False,
    world: str | None = None,
    data: str | None = None,
    **_: object,
) -> Splits:
    """The checked records of every split.

    Args:
        files: split -> file below the data folder. hub: `path` and `name` of a hub dataset, and
        `splits`: split -> what the hub calls it. columns: what each record must have: a text that
        is not blank, a list of such texts that is not empty, or any number. first: only so many
        records of each split. quotes: a tsv's fields may be quoted, as in a csv; otherwise
        quotation marks are part of the text. world: generated items of this task of the bundled
        world, instead of everything above. data: the data folder; None: $EDITKIT_DATA, then the
        hub.

    Raises:
        ConfigError: where the data was looked for and what to do; a file that cannot be read; a
        record without one of the columns.
    """
    if world is not None:
        items = task_items(
            generate_world(0), world, n=WORLD_ITEMS
        )  # the world of seed 0 is the one that the bundled models know
        return {
            "test": [
                {"prompt": item.prompt, "answer": item.answer, "choices": list(item.choices or ())}
                for item in items
            ]
        }
    folder = data or os.environ.get(DATA_FOLDER)
    found = locate(folder, files or {}) if folder else None
    if found is not None:
        splits = {split: read_file(path, quotes=quotes)[:first] for split, path in found.items()}
        where = {split: str(path) for split, path in found.items()}
    else:
        looked = (
            f"{' or '.join(map(str, places(folder, files or {})))} (not there)"
            if folder
            else f"${DATA_FOLDER} is not set"
        )
        if data is not None or hub is None:
            raise ConfigError(
                f"no data - {looked}{'' if data else '; no hub dataset is known'} - "
                f"{advice(files or {})}"
            )
        splits = {
            split: rows[:first]
            for split, rows in read_hub(hub, looked=looked, files=files or {}).items()
        }
        where = {split: f"hub dataset {hub['path']}, {split}" for split in splits}
    problems = [
        problem
        for split, rows in splits.items()
        for problem in check_rows(rows, columns, where=where[split])
    ]
    if problems:
        raise ConfigError(problems)
    return splits


def advice(files: Mapping[str, str]) -> str:
    """How a user can provide missing data."""
    if not files:
        return "no local layout of this dataset is known: the hub must be reached."
    names = ", ".join(files.values())
    return f"set suite.data=FOLDER or {DATA_FOLDER}=FOLDER to a folder with {names}."


def places(folder: str, files: Mapping[str, str]) -> list[Path]:
    """Where a folder may have the first of these files."""
    first = next(iter(files.values()), "")
    return [Path(folder).expanduser() / part / first for part in ("downstream", "")]


def locate(folder: str, files: Mapping[str, str]) -> dict[str, Path] | None:
    """The path of each file, if all of them are there."""
    for root in (Path(folder).expanduser() / "downstream", Path(folder).expanduser()):
        found = {split: root / file for split, file in files.items()}
        if found and all(path.is_file() for path in found.values()):
            return found
    return None


def read_file(path: Path, *, quotes: bool = False) -> list[Row]:
    """The records of one file, by its ending. Raises ConfigError where it cannot be read."""
    readers: dict[str, Callable[[str], list[Any]]] = {
        ".jsonl": lambda text: [json.loads(line) for line in text.split("\n") if line.strip()],
        ".json": json.loads,
        ".tsv": lambda text: _table(
            text,
            names=None,
            delimiter="\t",
            quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        ),
        ".csv": lambda text: _table(text, names=MMLU_COLUMNS),
    }
    try:
        rows = readers[path.suffix](path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:  # also what json, csv and utf-8 complain about
        raise ConfigError(f"{path}: cannot be read - {' '.join(str(error).split())}") from None
    if not isinstance(rows, list):
        raise ConfigError(f"{path}: holds one {type(rows).__name__} - a list of records is needed")
    return rows


def _table(text: str, *, names: Sequence[str] | None, **dialect: Any) -> list[Row]:
    """Rows by the columns' names; None: the first row has them."""
    rows = list(
        csv.reader(io.StringIO(text, newline=""), **dialect)
    )  # splitlines would cut a text at a form feed
    names, rows = (names, rows) if names is not None else (rows[0] if rows else (), rows[1:])
    if wrong := [number for number, row in enumerate(rows) if len(row) != len(names)]:
        raise ValueError(
            f"record {wrong[0]} has {len(rows[wrong[0]])} columns instead of {len(names)} "
            f"({', '.join(names)})"
        )
    return [dict(zip(names, row, strict=True)) for row in rows]


def read_hub(hub: Mapping[str, Any], *, looked: str, files: Mapping[str, str]) -> Splits:
    """The splits of a hub dataset. Raises ConfigError, with where else it was looked, if it cannot
    be reached.
    """
    import datasets

    try:
        return {
            split: [
                dict(row)
                for row in datasets.load_dataset(hub["path"], hub.get("name"), split=theirs)
            ]
            for split, theirs in hub["splits"].items()
        }
    except (
        Exception
    ) as error:  # the hub's clients raise errors of many libraries; any of them means the same here
        told = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"no data - {looked}; hub dataset {hub['path']} cannot be read "
            f"({type(error).__name__}: {told}) - {advice(files)}"
        ) from None


def check_rows(rows: Iterable[Any], columns: Sequence[str], *, where: str) -> list[str]:
    """What is wrong with the records, which are counted from 0."""
    problems = []
    number = -1
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            problems.append(
                f"{where}, record {number}: is not an object with columns but of type "
                f"{type(row).__name__}"
            )
            continue
        for column in columns:
            if column not in row:
                problems.append(
                    f"{where}, record {number}: has no column {column!r} - it has: "
                    f"{', '.join(map(str, row)) or 'none'}"
                )
            elif _is_empty(row[column]):
                problems.append(f"{where}, record {number}: {column} is empty")
    if number < 0:
        problems.append(f"{where}: holds no records")
    hidden = len(problems) - MAX_SHOWN
    return [*problems[:MAX_SHOWN], *([f"{where}: {hidden} more problems"] if hidden > 0 else [])]


def _is_empty(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Sequence):
        return not value or any(map(_is_empty, value))
    return value is None
