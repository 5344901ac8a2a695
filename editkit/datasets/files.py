"""Datasets of records in files, and files that are no JSON list: folders of files, JSON lines,
tables of values separated by commas, and objects of records by name.
"""

from __future__ import annotations

import abc
import bisect
import csv
import hashlib
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from editkit.datasets.base import AbstractDataset, LoadedDataset, OnBadRecord, Order, load_records
from editkit.datasets.fields import Fields
from editkit.datasets.records import (
    Malformed,
    Reader,
    Records,
    find_records,
    parsed,
    read_bytes,
    read_json,
    read_json_lines,
)
from editkit.errors import ConfigError, message
from editkit.types import EditRequest


@dataclass(frozen=True, kw_only=True)
class AbstractRecordFiles(AbstractDataset):
    """A dataset whose records lie in a file, in one of several places. They are parsed alone."""

    advice: ClassVar[str]  # a sentence about where the files are, for the error message
    read: ClassVar[Reader] = staticmethod(read_json)

    name: str
    path: str | None
    files: tuple[str, ...]  # the first of them that exists in $EDITKIT_DATA is used if path is null
    id: str | None  # hub dataset, used if there is no file
    order: Order
    limit: int | None
    on_bad_record: OnBadRecord

    @property
    def file_on_hub(self) -> str | None:
        """The file of the hub's repository, as in `find_records`."""
        return None

    @abc.abstractmethod
    def parse(self, fields: Fields, index: int) -> list[EditRequest]:
        """The requests of a record. Problems stay in the findings of the fields."""

    def load(self, seed: int) -> LoadedDataset:
        return load_records(
            find_records(
                path=self.path,
                files=self.files,
                hub_id=self.id,
                hub_file=self.file_on_hub,
                advice=self.advice,
                read=self.read,
            ),
            self.parse,
            name=self.name,
            order=self.order,
            seed=seed,
            limit=self.limit,
            on_bad_record=self.on_bad_record,
        )


def read_list_or_lines(path: Path, /, *, key: str) -> Records:
    """The records of a JSON list, or of a JSON lines file, whatever its name ends in."""
    head = b"" if path.is_dir() or not path.exists() else _head(path)
    return (read_json_lines if head == b"{" else read_json)(path, key=key)


def _head(path: Path) -> bytes:
    """The first byte of a file that is not blank, behind a byte order mark."""
    with path.open("rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def read_folder(path: Path, /, *, key: str, read: Reader, suffix: str = "json") -> Records:
    """The records of a file; of a folder those of all files with the suffix, by their names.

    Raises:
        ConfigError: as `read`, for all files together; or the folder has no such file.
    """
    if not path.is_dir():
        return read(path, key=key)
    parts: list[tuple[str, Records]] = []
    problems: list[str] = []
    for file in sorted(path.glob(f"*.{suffix}")):
        try:
            parts.append((file.name, read(file, key=key)))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if not parts:
        raise ConfigError(
            message(key, "the folder has no file of records", got=str(path), expected=f"*.{suffix}")
        )
    ends = list(itertools.accumulate(len(records.records) for _, records in parts))

    def place(index: int) -> str:
        number = bisect.bisect_right(ends, index)
        name, records = parts[number]
        return f"{name}, {records.place(index - (ends[number] - len(records.records)))}"

    digests = "".join(f"{name} {records.digest}\n" for name, records in parts)
    return Records(
        records=[record for _, records in parts for record in records.records],
        digest=hashlib.sha256(digests.encode()).hexdigest(),
        origin=str(path),
        named=place,
    )


def read_objects(path: Path, /, *, key: str) -> Records:
    """The records of a JSON object that holds them by name. Each record is given the key `id`: the
    file's name without its ending, and its own.
    """
    content = read_bytes(path, key=key, suffix="json")
    value = parsed(content, path)
    if not isinstance(value, Mapping):
        raise ConfigError(
            message(
                str(path),
                "the file has no object",
                got=type(value).__name__,
                expected="a JSON object of records by name",
            )
        )
    names = list(value)
    records = [
        {**record, "id": f"{path.stem}/{name}"} if isinstance(record, Mapping) else record
        for name, record in value.items()
    ]
    return Records(
        records=records,
        digest=hashlib.sha256(content).hexdigest(),
        origin=str(path),
        named=lambda index: f"record {names[index]}",
    )


def read_csv(path: Path, /, *, key: str) -> Records:
    """The rows of a table with a line of column names. A row of another length is a `Malformed`.

    Raises:
        ConfigError: the file cannot be read, or its columns have no or equal names.
    """
    content = read_bytes(path, key=key, suffix="csv")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            message(str(path), f"byte {error.start} is not UTF-8", expected="CSV in UTF-8")
        ) from None
    rows, records, lines = csv.reader(io.StringIO(text, newline="")), [], []
    columns = next(rows, [])
    if not all(columns) or not columns or len(set(columns)) < len(columns):
        raise ConfigError(
            message(
                f"{path}, line 1",
                "the columns have no or equal names",
                got=", ".join(columns)[:80],
                expected="a table whose first line names the columns",
            )
        )
    for row in rows:
        if row:
            records.append(_row(columns, row))
            lines.append(rows.line_num)
    return Records(
        records=records, digest=hashlib.sha256(content).hexdigest(), origin=str(path), lines=lines
    )


def _row(columns: Sequence[str], row: Sequence[str]) -> object:
    if len(row) != len(columns):
        return Malformed(f"{len(row)} instead of {len(columns)}", "has no value for each column")
    return dict(zip(columns, row, strict=True))
