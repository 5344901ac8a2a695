"""What a reader must know about the numbers of a run, as sentences."""

from __future__ import annotations

from collections.abc import Iterator

from editkit.records.reader import RunRecords

MOST_NAMED = 6  # matrices that a note lists


def notes_of(run: RunRecords) -> Iterator[str]:
    """A sentence on each part of a run that editkit did not compute."""
    if (foreign := run.provenance.get("foreign")) is not None:
        yield (
            f"{run.folder}: a foreign run, {foreign['edits']} edits in the layout of "
            f"{foreign['layout']}. Another program measured its numbers; its files do not tell "
            "whether edits add up or are taken back one by one"
        )
    edited = (run.provenance.get("editor") or {}).get("edited")
    if isinstance(edited, dict):
        names = edited.get("differs_in") or []
        yield (
            f"{run.folder}: the edits of {edited.get('model')} were made elsewhere; it differs "
            f"from its base in {len(names)} tensors: {', '.join(map(str, names[:MOST_NAMED]))}"
            f"{', ...' if len(names) > MOST_NAMED else ''}"
        )
    imported = run.provenance.get("statistics_imported")
    if isinstance(imported, dict) and imported:
        files = dict.fromkeys(str(entry.get("file")) for entry in imported.values())
        yield (
            f"{run.folder}: the covariance statistics were imported and not computed here: "
            f"{', '.join(files)}"
        )
