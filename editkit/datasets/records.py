"""Raw dataset records: their sources, and readers for JSON and JSON lines files. Further kinds of
files are in `editkit.datasets.files`.
"""

from __future__ import annotations

import hashlib
import json
import os
from codecs import BOM_UTF8
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from editkit.datasets.strict_json import BadJson, is_utf_16, parse
from editkit.errors import ConfigError, message

DATA_FOLDER = "EDITKIT_DATA"  # environment variable with a folder of datasets
UTF_8_JSON = "JSON in UTF-8"


@dataclass(frozen=True, slots=True)
class Malformed:
    """Takes the place of a record that cannot be read."""

    reason: str
    problem: str = "is not JSON"


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Records before any check."""

    records: Sequence[object]
    # sha256 of the file's bytes, or of the records as canonical JSON for tables of the hub
    digest: str
    origin: str
    lines: Sequence[int] | None = None  # by record, its line number in a file of lines
    named: Callable[[int], str] | None = None  # places that are neither numbers nor lines

    def place(self, index: int) -> str:
        """The place of a record in messages."""
        if self.named is not None:
            return self.named(index)
        return f"record {index}" if self.lines is None else f"line {self.lines[index]}"


class Reader(Protocol):
    """Reads one file; `key` names the option with its path."""

    def __call__(self, path: Path, /, *, key: str) -> Records: ...


def read_json(path: Path, /, *, key: str) -> Records:
    """The list of records in a JSON file; `key` names the option with the path."""
    content = read_bytes(path, key=key, suffix="json")
    records = parsed(content, path)
    if not isinstance(records, list):
        raise ConfigError(
            message(
                str(path),
                "the file has no list",
                got=type(records).__name__,
                expected="a JSON list of records",
            )
        )
    return Records(records=records, digest=hashlib.sha256(content).hexdigest(), origin=str(path))


def parsed(content: bytes, path: Path) -> object:
    """The value of a JSON file's bytes. Raises ConfigError with the first problem."""
    try:
        return parse(content)
    except BadJson as error:
        place = f"{path}, line {error.line}, column {error.column}"
        raise ConfigError(message(place, error.told, expected=UTF_8_JSON)) from None


def find_records(
    *,
    path: str | None,
    files: Sequence[str],
    hub_id: str | None,
    hub_file: str | None = None,
    advice: str,
    read: Reader = read_json,
) -> Records:
    """Records from `path`, else from the first of `files` that exists in $EDITKIT_DATA, else from
    the hub.

    Args:
        hub_file: a file of the hub's repository, or all files of one folder as `folder/*.json`; all
            rows of all splits if None.
        advice: a sentence about another source of the dataset, for the error message.
        read: what a file, or a folder, is read with.

    Raises:
        ConfigError: there is no source (the message lists the searched places), or it cannot be
            read.
    """
    if path is not None:
        return read(Path(path).expanduser(), key="dataset.path")
    folder = os.environ.get(DATA_FOLDER)
    locals_ = [Path(folder).expanduser() / file for file in files] if folder else []
    for local in locals_:
        if local.exists():
            return read(local, key=f"${DATA_FOLDER}")
    missing = (
        " and ".join(map(str, locals_))
        + f" (${DATA_FOLDER}) {'do' if len(locals_) > 1 else 'does'} not exist"
    )
    searched = missing if locals_ else f"${DATA_FOLDER} is not set"
    reason = "no hub dataset in this layout is known (dataset.id is null)"
    if hub_id is not None:
        try:
            return _read_hub(hub_id) if hub_file is None else _read_hub_file(hub_id, hub_file, read)
        except ImportError:
            reason = f"hub dataset {hub_id} needs the package `datasets` (pip install datasets)"
        except Exception as error:  # the hub's clients raise errors of many libraries
            text = " ".join(str(error).split())[:200]
            reason = f"hub dataset {hub_id} cannot be read ({type(error).__name__}: {text})"
    raise ConfigError(
        message(
            "dataset.path",
            f"there is no data: dataset.path is null; {searched}; {reason}",
            fix=f"set dataset.path=FILE or {DATA_FOLDER}=FOLDER. {advice}",
        )
    )


def read_json_lines(path: Path, /, *, key: str) -> Records:
    """One record for each line that is not blank. A line that is not JSON becomes a `Malformed`, so
    that all of them are reported together.
    """
    content = read_bytes(path, key=key, suffix="jsonl")
    records: list[object] = []
    lines: list[int] = []
    if is_utf_16(content):
        raise ConfigError(message(str(path), "the text is UTF-16", expected=UTF_8_JSON))
    for number, line in enumerate(content.removeprefix(BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(parse(line))
        except BadJson as error:
            problem = error.told.removeprefix("malformed JSON: ")
            records.append(Malformed(f"{problem}, column {error.column}"))
        lines.append(number)
    return Records(
        records=records, digest=hashlib.sha256(content).hexdigest(), origin=str(path), lines=lines
    )


def read_bytes(path: Path, *, key: str, suffix: str) -> bytes:
    """The content of a file. Raises ConfigError if it cannot be read; `key` names the option with
    the path, and `suffix` the kind of file.
    """
    expected = f"a {suffix.upper()} file"
    if path.is_dir():
        files = ", ".join(sorted(child.name for child in path.glob(f"*.{suffix}"))) or "none"
        raise ConfigError(
            message(
                key,
                "the path is a folder",
                got=str(path),
                expected=f"{expected}; in the folder: {files}",
            )
        )
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            message(key, "the file does not exist", got=str(path), expected=expected)
        ) from None
    except OSError as error:
        raise ConfigError(
            message(key, f"the file cannot be read: {error.strerror}", got=str(path))
        ) from None


def _read_hub(hub_id: str) -> Records:
    import datasets

    splits = datasets.load_dataset(hub_id)
    # Splits are sorted by name, so that the order does not depend on the hub's listing.
    records = [dict(row) for split in sorted(splits) for row in splits[split]]
    canonical = json.dumps(records, sort_keys=True, ensure_ascii=False).encode()
    return Records(
        records=records,
        digest=hashlib.sha256(canonical).hexdigest(),
        origin=f"hub dataset {hub_id}",
    )


def _read_hub_file(hub_id: str, file: str, read: Reader) -> Records:
    import huggingface_hub

    if file.endswith("*.json"):
        root = huggingface_hub.snapshot_download(hub_id, repo_type="dataset", allow_patterns=[file])
        path = Path(root) / Path(file).parent
    else:
        path = Path(huggingface_hub.hf_hub_download(hub_id, file, repo_type="dataset"))
    return replace(read(path, key="dataset.id"), origin=f"hub dataset {hub_id}, {file}")
