"""The samples of a run's folder as records."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from editkit.files import file_name
from editkit.records.reader import RunRecords
from editkit.types import SampleRecord


def read_samples(run: RunRecords, *, name: str | None = None) -> Iterator[SampleRecord]:
    """The samples of a run in the order of steps, or those of one name.

    A file is named after step, view and name, with dashes between them. The view is one of the
    run's views: names may hold dashes.
    """
    views = {*run.views, *(run.config.get("restraint") or {})}
    ordered = {file_name(view): view for view in sorted(views, key=len, reverse=True)}
    for path in sorted(run.folder.glob("samples/*.jsonl.gz")):
        step, _, rest = path.name.removesuffix(".jsonl.gz").partition("-")
        quoted = next((view for view in ordered if rest.startswith(f"{view}-")), None)
        found = rest.removeprefix(f"{quoted}-")
        if quoted is not None and step.isdigit() and (name is None or found == file_name(name)):
            yield SampleRecord(
                step=int(step),
                view=ordered[quoted],
                name=unquote(found) if name is None else name,
                rows=tuple(_rows(path)),
            )


def _rows(path: Path) -> Iterator[dict[str, object]]:
    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        yield json.loads(line)
