"""Raw records: where they are found, how a JSON file is read, and how one record's fields are read and checked."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from editkit.errors import ConfigError

DATA_FOLDER = "EDITKIT_DATA"  # environment variable: a folder that holds datasets


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Records as they were read, not yet checked."""

    records: Sequence[object]
    digest: str  # sha256: of the file's bytes; of the records as canonical JSON where they came from the hub
    origin: str


def find_records(*, path: str | None, file: str, hub_id: str | None, advice: str) -> Records:
    """Records from `path`; else from `file` below $EDITKIT_DATA; else from the hub.

    Args:
        advice: where else a person gets this dataset; closes the error's text.

    Raises:
        ConfigError: nothing was found (it says where it looked), or what was found cannot be read.
    """
    if path is not None:
        return read_json(Path(path).expanduser(), key="dataset.path")
    folder = os.environ.get(DATA_FOLDER)
    local = Path(folder).expanduser() / file if folder else None
    if local is not None and local.exists():
        return read_json(local, key=f"${DATA_FOLDER}")
    looked = f"{local} (${DATA_FOLDER}) does not exist" if local else f"${DATA_FOLDER} is not set"
    reason = "dataset.id is null"
    if hub_id is not None:
        try:
            return _read_hub(hub_id)
        except ImportError:
            reason = f"hub dataset {hub_id} needs the package `datasets` (pip install 'editkit[hub]')"
        except Exception as error:  # the hub's clients raise errors of many libraries; any of them means the same here
            reason = f"hub dataset {hub_id} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    raise ConfigError(
        f"dataset: no data - dataset.path is null; {looked}; {reason} - set dataset.path=FILE or {DATA_FOLDER}=FOLDER. {advice}"
    )


def read_json(path: Path, *, key: str) -> Records:
    """The list of records that a JSON file holds; `key` names the setting that led to it."""
    if path.is_dir():
        found = ", ".join(sorted(child.name for child in path.glob("*.json"))) or "none"
        raise ConfigError(f"{key}: {path} is a folder - give one JSON file; it holds: {found}")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"{key}: {path} does not exist - give a JSON file") from None
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read - {error.strerror}") from None
    try:
        records = json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8 - a JSON file in UTF-8 is needed") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: malformed JSON - {error.msg}") from None
    if not isinstance(records, list):
        raise ConfigError(f"{path}: holds one {type(records).__name__} - a JSON list of records is needed")
    return Records(records=records, digest=hashlib.sha256(content).hexdigest(), origin=str(path))


def _read_hub(hub_id: str) -> Records:
    import datasets

    splits = datasets.load_dataset(hub_id)
    # Splits follow each other by name, so that the order does not hang on how the hub lists them.
    records = [dict(row) for split in sorted(splits) for row in splits[split]]
    canonical = json.dumps(records, sort_keys=True, ensure_ascii=False).encode()
    return Records(records=records, digest=hashlib.sha256(canonical).hexdigest(), origin=f"hub dataset {hub_id}")


class Fields:
    """Reads one record and notes all that is wrong with it, so that one pass reports everything.

    A field that cannot be read gives an empty value; `problems` says so in the end. A key with dots leads into nested records.
    """

    def __init__(self, record: object) -> None:
        self._record = record
        self.problems: list[tuple[str, str]] = []  # (field, reason)
        if not isinstance(record, Mapping):
            self.note("record", f"is not an object with fields but of type {type(record).__name__}")

    def note(self, name: str, reason: str) -> None:
        """Remembers a problem; only the first of each field counts."""
        if name not in (known for known, _ in self.problems):
            self.problems.append((name, reason))

    def get(self, key: str) -> object:
        """The raw value, None where there is none."""
        value: object = self._record
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def text(self, key: str) -> str:
        """A text that is there and not blank, without blanks at its ends."""
        return self._checked(key, self.get(key))

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of such texts."""
        values = self.get(key)
        if not isinstance(values, list):
            self.note(key, "is missing" if values is None else f"is not a list but of type {type(values).__name__}")
            return ()
        return tuple(self._checked(f"{key}[{index}]", value) for index, value in enumerate(values))

    def _checked(self, name: str, value: object) -> str:
        if not isinstance(value, str):
            self.note(name, "is missing" if value is None else f"is not a text but of type {type(value).__name__}")
            return ""
        try:
            value.encode()
        except UnicodeEncodeError:
            self.note(name, "is not valid Unicode (half of a surrogate pair)")
        if not value.strip():
            self.note(name, "is empty")
        return value.strip()

    def template(self, key: str, subject: str) -> str:
        """A prompt that already holds one "{}" for the subject."""
        prompt = self.text(key)
        if prompt and prompt.count("{}") != 1:
            self.note(key, 'does not hold exactly one "{}" for the subject')
        self._check_subject(subject)
        return prompt

    def template_of(self, key: str, subject: str) -> str:
        """A full prompt, with the subject's first occurrence as a word of its own replaced by "{}"; other occurrences stay.

        Single braces are ordinary text. A literal "{}" could not be told from the slot and is a problem.
        """
        prompt = self.text(key)
        self._check_subject(subject)
        if not prompt or not subject:
            return ""
        if "{}" in prompt:
            self.note(key, 'holds "{}", which marks the subject')
        whole = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)
        # Scripts without blanks between words know no whole match, hence the second try.
        start = whole.start() if whole else prompt.find(subject)
        if start < 0:
            self.note(key, "does not hold the subject")
            return ""
        return f"{prompt[:start]}{{}}{prompt[start + len(subject) :]}"

    def _check_subject(self, subject: str) -> None:
        if "{}" in subject:
            self.note("subject", 'holds "{}", which marks the subject in a prompt')
