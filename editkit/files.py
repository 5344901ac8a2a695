"""Files: written whole or not at all, and read the ways that many places need."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_atomically(path: Path, payload: bytes) -> None:
    """Writes under a temporary name beside `path`, waits for the disk, and renames: a reader never
    sees half a file.
    """
    with written_atomically(path) as temporary:
        temporary.write_bytes(payload)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """The same for what a library writes: gives the name to write under; nothing is left behind
    after an error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def file_digest(path: Path) -> str:
    """SHA-256 of the file, which is never in memory as a whole."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
