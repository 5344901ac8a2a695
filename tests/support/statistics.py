"""Second moments of a small text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from editkit.stats.corpus import StatsConfig


def text_stats(folder: Path, text: str, /, **changes: Any) -> StatsConfig:
    """The statistics of a text that is written into the folder, stored in its subfolder `stats`."""
    corpus = folder / "corpus.txt"
    corpus.write_text(text, encoding="utf-8")
    values: dict[str, Any] = {
        "name": "text",
        "source": "text",
        "path": str(corpus),
        "num_documents": 1000,
        "seed": 1,
        "preset": "full",
        "vectors_per_dimension": 10,
        "context_length": 32,
        "batch_tokens": 256,
        "products": "float32",
        "save_every_s": 0.0,
        "folder": str(folder / "stats"),
    }
    return StatsConfig(**values | changes)
