"""Raw records: where they are found, and how JSON files and JSON lines are read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from editkit.errors import ConfigError

DATA_FOLDER = "EDITKIT_DATA"  # environment variable: a folder that holds datasets


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands for a record that is no JSON at all."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Records as they were read, not yet checked."""

    records: Sequence[object]
    # sha256: of the file's bytes; of the records as canonical JSON where the hub's tables were read
    digest: str
    origin: str
    lines: Sequence[int] | None = None  # the line of each record, where each has one of its own

    def place(self, index: int) -> str:
        """How a person finds a record again."""
        return f"record {index}" if self.lines is None else f"line {self.lines[index]}"


def find_records(
    *,
    path: str | None,
    files: Sequence[str],
    hub_id: str | None,
    hub_file: str | None = None,
    advice: str,
) -> Records:
    """Records from `path`; else from the first of `files` that is below $EDITKIT_DATA; else from
    the hub.

    Args:
        hub_file: a JSON file of the hub's repository; None: all rows of all of its splits.
        advice: where else a person gets this dataset; closes the error's text.

    Raises:
        ConfigError: nothing was found (it says where it looked), or what was found cannot be read.
    """
    if path is not None:
        return read_json(Path(path).expanduser(), key="dataset.path")
    folder = os.environ.get(DATA_FOLDER)
    locals_ = [Path(folder).expanduser() / file for file in files] if folder else []
    for local in locals_:
        if local.exists():
            return read_json(local, key=f"${DATA_FOLDER}")
    missing = (
        " and ".join(map(str, locals_))
        + f" (${DATA_FOLDER}) {'do' if len(locals_) > 1 else 'does'} not exist"
    )
    looked = missing if locals_ else f"${DATA_FOLDER} is not set"
    reason = "no hub dataset in this layout is known (dataset.id is null)"
    if hub_id is not None:
        try:
            return _read_hub(hub_id) if hub_file is None else _read_hub_file(hub_id, hub_file)
        except ImportError:
            reason = f"hub dataset {hub_id} needs the package `datasets` (pip install datasets)"
        # the hub's clients raise errors of many libraries; any of them means the same here
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            reason = f"hub dataset {hub_id} cannot be read ({type(error).__name__}: {text})"
    raise ConfigError(
        f"dataset: no data - dataset.path is null; {looked}; {reason} - set dataset.path=FILE or "
        f"{DATA_FOLDER}=FOLDER. {advice}"
    )


def read_json(path: Path, *, key: str) -> Records:
    """The list of records that a JSON file holds; `key` names the setting that led to it."""
    content = read_bytes(path, key=key, suffix="json")
    try:
        records = json.loads(decoded(content, path))
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}, column {error.colno}: malformed JSON - {error.msg}"
        ) from None
    if not isinstance(records, list):
        raise ConfigError(
            f"{path}: holds one {type(records).__name__} - a JSON list of records is needed"
        )
    return Records(records=records, digest=hashlib.sha256(content).hexdigest(), origin=str(path))


def read_json_lines(path: Path, *, key: str) -> Records:
    """One record for each line that is not blank; a line that is no JSON becomes a `Malformed`, so
    that all of them are told at once.
    """
    content = read_bytes(path, key=key, suffix="jsonl")
    records: list[object] = []
    lines: list[int] = []
    for number, line in enumerate(decoded(content, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            records.append(Malformed(f"{error.msg}, column {error.colno}"))
        lines.append(number)
    return Records(
        records=records, digest=hashlib.sha256(content).hexdigest(), origin=str(path), lines=lines
    )


def read_bytes(path: Path, *, key: str, suffix: str) -> bytes:
    if path.is_dir():
        found = ", ".join(sorted(child.name for child in path.glob(f"*.{suffix}"))) or "none"
        raise ConfigError(
            f"{key}: {path} is a folder - give one {suffix.upper()} file; it holds: {found}"
        )
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{key}: {path} does not exist - give a {suffix.upper()} file") from None
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read - {error.strerror}") from None


def decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: byte {error.start} is not UTF-8 - a file in UTF-8 is needed"
        ) from None


def _read_hub(hub_id: str) -> Records:
    import datasets

    splits = datasets.load_dataset(hub_id)
    # Splits follow each other by name, so that the order does not hang on how the hub lists them.
    records = [dict(row) for split in sorted(splits) for row in splits[split]]
    canonical = json.dumps(records, sort_keys=True, ensure_ascii=False).encode()
    return Records(
        records=records,
        digest=hashlib.sha256(canonical).hexdigest(),
        origin=f"hub dataset {hub_id}",
    )


def _read_hub_file(hub_id: str, file: str) -> Records:
    import huggingface_hub

    path = huggingface_hub.hf_hub_download(hub_id, file, repo_type="dataset")
    found = read_json(Path(path), key="dataset.id")
    return Records(
        records=found.records, digest=found.digest, origin=f"hub dataset {hub_id}, {file}"
    )
