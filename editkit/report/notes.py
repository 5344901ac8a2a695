"""What a reader must know about the numbers of a run, as sentences."""

from __future__ import annotations

from collections.abc import Iterator

from editkit.records.reader import RunRecords


def notes_of(run: RunRecords) -> Iterator[str]:
    """A sentence on each part of a run that editkit did not compute."""
    imported = run.provenance.get("statistics_imported")
    if isinstance(imported, dict) and imported:
        files = dict.fromkeys(str(entry.get("file")) for entry in imported.values())
        yield (
            f"{run.folder}: the covariance statistics were imported and not computed here: "
            f"{', '.join(files)}"
        )
