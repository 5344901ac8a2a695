"""Files: written whole or not at all, locked by one process at a time, read the ways that many
places need.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from editkit.errors import ConfigError, OutOfSpace, message

LOCK = ".lock"  # the file in a folder whose lock stands for the whole folder
RETRY_S = 0.02  # between two attempts to take a lock
LONGEST_PART = 100  # bytes of a file's name that the name of something takes
# What stands at a path, or who may use it, is the user's to change.
UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ELOOP),
)
UMASK = os.umask(0o077)  # can be read only by setting it
os.umask(UMASK)
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, limit of a file's size


def write_atomically(path: Path, payload: bytes) -> None:
    """Writes under a temporary name in the same folder, waits for the disk, and renames: a reader
    never sees half a file.
    """
    with written_atomically(path) as temporary:
        temporary.write_bytes(payload)


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """The same for files that a library writes: gives the name to write under. Nothing is left
    behind after an error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        with_usual_mode(temporary)
        os.replace(temporary, path)
    except Exception as error:
        if (number := out_of_space_number(error)) is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def with_usual_mode(path: Path) -> None:
    """Gives a file the permissions of any other new file. safetensors writes files that only their
    owner may read, so that nobody else in a group could use them.
    """
    path.chmod(0o666 & ~UMASK)


def out_of_space_number(error: BaseException) -> int | None:
    """The number of an operating system's error that says that nothing more can be written; None
    for every other error. Libraries in Rust give the number as text: `(os error 28)`.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    return number if number in OUT_OF_SPACE else None


def as_invalid(error: Exception) -> ConfigError | None:
    """The error if it is the user's to fix: a ConfigError, a full disk, or a path that is too long,
    is no folder, or may not be read or written. None for every other error.
    """
    if isinstance(error, ConfigError):
        return error
    if not isinstance(error, OSError):
        return None
    if error.errno == errno.ENAMETOOLONG:
        expected = "at most 255 bytes between two slashes, and 4,095 in all"
        return ConfigError(
            message("path", "it is too long", got=str(error.filename), expected=expected)
        )
    if error.errno in UNUSABLE and error.filename is not None:
        return ConfigError(message(str(error.filename), f"cannot be used ({error.strerror})"))
    if out_of_space_number(error) is None:
        return None
    problem, fix = f"cannot be written ({error.strerror})", "free space and repeat the command"
    return OutOfSpace(message(error.filename or "output", problem, fix=fix))


def take_lock(file: IO[Any], *, patience_s: float | None = 0.0, shared: bool = False) -> bool:
    """Returns whether this process now holds the lock of an open file.

    The kernel keeps the lock (flock) until the file is closed or the process ends, however that
    happens: a killed process leaves nothing to clean up. Between machines it works where the shared
    file system supports flock: NFS does, Lustre when it is mounted with `flock`.

    Args:
        patience_s: seconds to keep trying while another process holds the lock. None: without end.
        shared: take a lock that other shared locks may coexist with.

    Raises:
        OSError: the file system has no locks.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    if patience_s is None:
        fcntl.flock(file, kind)
        return True
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(RETRY_S)


def file_name(text: str) -> str:
    """The text as a part of a file's name, with %XX for what could lead elsewhere or act in HTML.
    `urllib.parse.unquote` gives the text, unless it is so long that a digest replaces its end.
    """
    quoted = re.sub(r"[^\w .+=,@~-]", lambda each: quote(each[0], errors="replace", safe=""), text)
    if len(quoted.encode()) <= LONGEST_PART:
        return quoted
    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]
    return f"{quoted.encode()[: LONGEST_PART - 9].decode(errors='ignore')}~{digest}"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file is missing or holds no JSON object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def not_an_object(path: Path) -> str | None:
    """Why a file does not hold a JSON object; None if it does."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except UnicodeDecodeError as error:
        return f"byte {error.start} is not UTF-8"
    except json.JSONDecodeError as error:
        return f"malformed JSON in line {error.lineno}, column {error.colno}: {error.msg}"
    except (ValueError, RecursionError):  # an integer of thousands of digits; thousands of levels
        return "it is not JSON that can be read"
    return None if isinstance(value, dict) else f"it holds no object but a {type(value).__name__}"


def file_digest(path: Path) -> str:
    """The file's SHA-256 in hexadecimal. The file is never in memory as a whole."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
