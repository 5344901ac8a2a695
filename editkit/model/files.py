"""A digest of the files that a model is loaded from, which reads only a little of large ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from editkit.model.source import Source

READ = {".bin", ".jinja", ".json", ".model", ".safetensors", ".txt"}  # what transformers loads
WHOLE = 2**26  # bytes of a file that is read whole
BLOCK, BLOCKS = 2**12, 256  # bytes and number of the blocks that are read of a larger one


def files_digest(sources: Iterable[Source], further: Iterable[Path] = ()) -> str | None:
    """32 hex digits of the names, sizes and contents of the files in these places; None if none of
    them is a folder. Of a file above 64 MiB, evenly spaced blocks are read: the digest of other
    weights differs, that of a few other values may not.

    Args:
        further: single files.
    """
    places = [source for source in sources if source.is_folder]
    if not places:
        return None
    total = hashlib.sha256()
    for path in [*(path for source in places for path in _files(source)), *further]:
        size = path.stat().st_size
        total.update(f"{path.name} {size} ".encode())
        with open(path, "rb") as file:
            if size <= WHOLE:
                total.update(file.read())
                continue
            for number in range(BLOCKS):
                file.seek((size - BLOCK) * number // (BLOCKS - 1))
                total.update(file.read(BLOCK))
    return total.hexdigest()[:32]


def _files(source: Source) -> list[Path]:
    if source.gguf is not None:
        return [source.gguf]
    folder = Path(source.place)
    return sorted(path for path in folder.iterdir() if path.suffix in READ and path.is_file())
