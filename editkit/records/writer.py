"""The record files of a run: `steps.jsonl`, `evals.jsonl` and, on request, `ledger.jsonl`, one JSON
object a line.

Records are only ever appended. A checkpoint holds the lengths of the files. Resuming from it
truncates them to these lengths, so that a killed run leaves no duplicate and no partial line.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from editkit.errors import ConfigError, message
from editkit.files import file_name, write_atomically
from editkit.records.ledger import LEDGER, LedgerRecord, LedgerWriter
from editkit.types import EvalRecord, SampleRecord, StepRecord, as_json

STEPS, EVALS = "steps.jsonl", "evals.jsonl"


def save_samples(record: SampleRecord, folder: Path) -> Path:
    """Writes `samples/<step>-<view>-<name>.jsonl.gz`. The same record gives the same bytes."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in record.rows)
    path = folder / f"{record.step:06d}-{file_name(record.view)}-{file_name(record.name)}.jsonl.gz"
    write_atomically(path, gzip.compress(lines.encode(), mtime=0))
    return path


class RecordFiles:
    """Both files, and that of the ledger of a run that keeps one, open for appending."""

    def __init__(
        self,
        folder: Path,
        record_bytes: Mapping[str, int],
        ledger: Mapping[str, Any] | None = None,
    ) -> None:
        """Truncates the files to `record_bytes`, or to nothing if their name is not there.

        Args:
            ledger: the head of the ledger; None: none is kept.

        Raises:
            ConfigError: a file is shorter.
        """
        self._files: dict[str, IO[bytes]] = {}
        for name in (STEPS, EVALS, *(() if ledger is None else (LEDGER,))):
            path, length = folder / name, record_bytes.get(name, 0)
            size = path.stat().st_size if path.exists() else 0
            if size < length:
                raise ConfigError(
                    message(
                        str(path),
                        "records were lost since the last checkpoint",
                        got=f"{size} bytes",
                        expected=f"at least {length} bytes",
                        fix="start anew with resume=never",
                    )
                )
            file = open(path, "ab")  # noqa: SIM115 (it stays open as long as the run)
            file.truncate(length)
            self._files[name] = file
        self._ledger = None if ledger is None else LedgerWriter(folder=folder, head=ledger)

    def append_block(self, record: LedgerRecord) -> None:
        """Writes the factors of a block, then its line."""
        assert self._ledger is not None
        self._files[LEDGER].write(self._ledger.line(record))
        self._files[LEDGER].flush()

    def append(self, record: StepRecord | EvalRecord) -> None:
        name = STEPS if isinstance(record, StepRecord) else EVALS
        self._files[name].write(json.dumps(as_json(record), allow_nan=False).encode() + b"\n")
        self._files[name].flush()

    def sync(self) -> dict[str, int]:
        """The files' lengths in bytes, after everything is on the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        """Closes the files. A resumed run writes again what a full disk did not take."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
