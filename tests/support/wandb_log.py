"""Reads an offline W&B run back: LevelDB log blocks of 32 KiB after a header of seven bytes, each
record a protobuf message.
"""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32 * 1024, struct.Struct("<IHB")


def messages(path: Path):
    """The records of a `.wandb` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + HEADER.size <= len(data):
        if BLOCK - at % BLOCK < HEADER.size:  # what is too short for a header is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        at += HEADER.size
        if kind == 0 or at + length > len(data):  # the rest is still being written
            break
        parts += data[at : at + length]
        at += length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def items(entries) -> dict[str, Any]:
    return {
        entry.key or "/".join(entry.nested_key): json.loads(entry.value_json) for entry in entries
    }


class Logged:
    """What one offline run holds."""

    def __init__(self, folder: Path) -> None:
        (self.path,) = folder.glob("run-*.wandb")
        deadline = time.monotonic() + 20
        while (
            not any(record.HasField("exit") for record in messages(self.path))
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)  # W&B's own process may still be writing when `finish` has returned
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.metrics: list[Any] = []
        self.artifacts: list[Any] = []
        self.exit_code: int | None = None
        for record in messages(self.path):
            if record.HasField("run"):
                self.run = record.run
                self.config |= items(record.run.config.update)
            elif record.HasField("history"):
                self.history.append(items(record.history.item))
            elif record.HasField("metric"):
                self.metrics.append(record.metric)
            elif record.HasField("artifact"):
                self.artifacts.append(record.artifact)
            elif record.HasField("exit"):
                self.exit_code = record.exit.exit_code


def logged(run: Path) -> list[Logged]:
    """The offline runs below a cell's folder, oldest first."""
    return [Logged(path) for path in sorted((run / "wandb").glob("offline-run-*"))]
