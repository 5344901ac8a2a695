"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def write_atomically(path: Path, payload: bytes) -> None:
    """Writes under a temporary name beside `path`, waits for the disk, and renames: a reader never sees half a file."""
    with written_atomically(path) as temporary:
        temporary.write_bytes(payload)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """The same for what a library writes: gives the name to write under; nothing is left behind after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
