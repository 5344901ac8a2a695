"""The records of tasks, read and checked. The yaml of a task names `load` as its `custom_dataset`.

Local files are jsonl, json (a list), tsv (with a line of names) and MMLU's csv (without one), in
the folder `suite.data`, otherwise $EDITKIT_DATA, or in its folder `downstream`. Without local files
the hub is asked. The items of `suite=small` are jsonl files beside their yamls. Nothing here needs
torch, a model or the harness.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from editkit.datasets.strict_json import BadJson, decode, parse_text
from editkit.datasets.world import generate_world, task_items
from editkit.errors import ConfigError, message

DATA_FOLDER = "EDITKIT_DATA"  # environment variable: a folder that holds datasets
WORLD_ITEMS = 500  # of each task of the bundled world, which has no end
BUNDLED = Path(__file__).parent / "small"
MMLU_COLUMNS = ("question", "A", "B", "C", "D", "answer")  # of its csv files
MAX_SHOWN = 5  # problems of one file that an error lists

Row = dict[str, Any]
Splits = dict[str, list[Row]]


def load(**options: Any) -> dict[str, Any]:
    """The splits as `datasets.Dataset`s, by name. `options` are those of `read`. lm-eval adds a
    task's metadata.
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
    bundled: str | None = None,
    data: str | None = None,
    **_: object,
) -> Splits:
    """The checked records of every split.

    Args:
        files: the file of each split, below the data folder.
        hub: `path` and `name` of a hub dataset, and `splits`, the hub's name of each split.
        columns: that each record must have: a text that is not blank, a list of such texts that is
            not empty, or a number.
        first: the number of records to take of each split.
        quotes: whether the fields of a tsv may be quoted as in a csv. Otherwise quotation marks are
            part of the text.
        world: the task of the bundled world whose items are generated, instead of all of the above.
        bundled: the task of `suite=small` whose items are read, instead of `files` and `hub`.
        data: the data folder; None: $EDITKIT_DATA, then the hub.

    Raises:
        ConfigError: there is no data, a file cannot be read, or a record lacks a column.
    """
    if world is not None:
        # The bundled models know the world of seed 0.
        items = task_items(generate_world(0), world, n=WORLD_ITEMS)
        return {
            "test": [
                {"prompt": item.prompt, "answer": item.answer, "choices": list(item.choices or ())}
                for item in items
            ]
        }
    folder = data or os.environ.get(DATA_FOLDER)
    paths = locate(folder, files or {}) if folder else None
    if bundled is not None:
        paths = {"test": BUNDLED / f"{bundled}.jsonl"}
    if paths is not None:
        splits = {split: read_file(path, quotes=quotes)[:first] for split, path in paths.items()}
        where = {split: str(path) for split, path in paths.items()}
    else:
        expected = " or ".join(map(str, places(folder, files or {}))) if folder else DATA_FOLDER
        looked = f"expected {expected}" if folder else f"${expected} is not set"
        if data is not None or hub is None:
            known = "" if data else "; no hub dataset is known"
            raise ConfigError(f"no data ({looked}{known}). Fix: {advice(files or {})}.")
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
        return "connect to the hub, as no local layout of this dataset is known"
    names = ", ".join(files.values())
    return f"set suite.data=FOLDER or {DATA_FOLDER}=FOLDER to a folder with {names}"


def places(folder: str, files: Mapping[str, str]) -> list[Path]:
    """The paths in a folder at which the first of these files is expected."""
    first = next(iter(files.values()), "")
    return [Path(folder).expanduser() / part / first for part in ("downstream", "")]


def locate(folder: str, files: Mapping[str, str]) -> dict[str, Path] | None:
    """The path of each file; None unless all of them exist."""
    for root in (Path(folder).expanduser() / "downstream", Path(folder).expanduser()):
        paths = {split: root / file for split, file in files.items()}
        if paths and all(path.is_file() for path in paths.values()):
            return paths
    return None


def read_file(path: Path, *, quotes: bool = False) -> list[Row]:
    """The records of one file, by its suffix. Raises ConfigError if it cannot be read."""
    readers: dict[str, Callable[[str], list[Any]]] = {
        ".jsonl": _json_lines,
        ".json": parse_text,
        ".tsv": lambda text: _table(
            text,
            names=None,
            delimiter="\t",
            quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
        ),
        ".csv": lambda text: _table(text, names=MMLU_COLUMNS),
    }
    try:
        rows = readers[path.suffix](decode(path.read_bytes()))
    except (OSError, ValueError, csv.Error) as error:  # BadJson is a ValueError
        got = " ".join(str(error).split())
        raise ConfigError(message(str(path), "cannot be read", got=got)) from None
    if not isinstance(rows, list):
        got = type(rows).__name__
        problem, expected = "not a list of records", "a list"
        raise ConfigError(message(str(path), problem, got=got, expected=expected))
    return rows


def _json_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(parse_text(line))
            except BadJson as error:
                raise replace(error, line=number) from None
    return rows


def _table(text: str, *, names: Sequence[str] | None, **dialect: Any) -> list[Row]:
    """Rows by the columns' names; None: the first row has the names."""
    # splitlines would cut a text at a form feed.
    rows = list(csv.reader(io.StringIO(text, newline=""), **dialect))
    if names is None:
        names, rows = rows[0] if rows else (), rows[1:]
    if wrong := [number for number, row in enumerate(rows) if len(row) != len(names)]:
        raise ValueError(
            f"record {wrong[0]} has {len(rows[wrong[0]])} columns instead of {len(names)} "
            f"({', '.join(names)})"
        )
    return [dict(zip(names, row, strict=True)) for row in rows]


def read_hub(hub: Mapping[str, Any], *, looked: str, files: Mapping[str, str]) -> Splits:
    """The splits of a hub dataset. Raises ConfigError if it cannot be reached; `looked` is the
    result of the search for local files.
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
    except Exception as error:  # the hub's clients raise errors of many libraries
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConfigError(
            f"no data ({looked}; hub dataset {hub['path']} cannot be read: {reason}). "
            f"Fix: {advice(files)}."
        ) from None


def check_rows(rows: Iterable[Any], columns: Sequence[str], *, where: str) -> list[str]:
    """The problems of the records, which are counted from 0."""
    problems = []
    number = -1
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            key, got = f"{where}, record {number}", type(row).__name__
            problems.append(message(key, "not an object with columns", got=got))
            continue
        for column in columns:
            if column not in row:
                key, got = f"{where}, record {number}", ", ".join(map(str, row)) or "no columns"
                problems.append(message(key, f"has no column {column!r}", got=got))
            elif _is_empty(row[column]):
                problems.append(message(f"{where}, record {number}", f"{column} is empty"))
    if number < 0:
        problems.append(message(where, "has no records"))
    hidden = len(problems) - MAX_SHOWN
    more = [message(where, f"{hidden} more problems")] if hidden > 0 else []
    return [*problems[:MAX_SHOWN], *more]


def _is_empty(value: object) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, Sequence):
        return not value or any(map(_is_empty, value))
    return value is None
