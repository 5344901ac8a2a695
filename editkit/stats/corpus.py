"""The texts that second moments are taken over: the bundled world's, a text file's, or a hub dataset's."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from editkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Where the texts come from, how many, and where the statistics are stored."""

    name: str
    source: Literal["world", "text", "hub", "none"]
    path: str | None = None  # text: a file, or a folder of .txt files; hub: the dataset's id
    subset: str | None = None  # hub: the dataset's configuration
    split: str = "train"  # hub
    column: str = "text"  # hub
    num_documents: int
    seed: int  # of the sample
    context_length: int  # tokens of a document that count; the model's own number of positions if that is smaller
    batch_tokens: int  # tokens of a forward pass, padding included
    folder: str

    def __post_init__(self) -> None:
        positive = ("num_documents", "context_length", "batch_tokens")
        problems = [f"stats.{name} must be positive - got {getattr(self, name)}." for name in positive if getattr(self, name) < 1]
        if self.source in ("text", "hub") and not self.path:
            what = "a text file or a folder of .txt files" if self.source == "text" else "a dataset's id on the hub"
            problems.append(f"stats.path is missing - stats={self.source} wants {what} there.")
        if problems:
            raise ConfigError(problems)


def texts(config: StatsConfig) -> Iterator[str]:
    """The sampled documents, the same ones in the same order each time. Raises ConfigError where the source cannot be read."""
    if config.source == "world":
        from editkit.datasets.world import corpus, generate_world

        yield from corpus(generate_world(), seed=config.seed, num_documents=config.num_documents)
    elif config.source == "text":
        yield from _sample(_lines(Path(config.path or "").expanduser()), config)
    elif config.source == "hub":
        yield from _hub(config)


def digest(documents: Iterable[str]) -> str:
    """Digest of the documents' content and order; their borders count."""
    total = hashlib.sha256()
    for document in documents:
        encoded = document.encode()
        total.update(len(encoded).to_bytes(8, "little"))
        total.update(encoded)
    return total.hexdigest()


def _lines(path: Path) -> list[str]:
    """Every line that is not blank is a document, as for the `text` loader of Hugging Face datasets."""
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"stats.path cannot be read - {path} ({error}) - a UTF-8 text file or a folder of .txt files.") from None
    if not lines:
        raise ConfigError(f"stats.path holds no text - {path} - a UTF-8 text file, or a folder of .txt files, with a document a line.")
    return lines


def _sample(documents: Sequence[str], config: StatsConfig) -> Iterator[str]:
    """`num_documents` of them, or all if there are fewer, in their own order."""
    chosen: Sequence[int] = range(len(documents))
    if config.num_documents < len(documents):
        chosen = sorted(random.Random(config.seed).sample(chosen, config.num_documents))
    return (documents[index] for index in chosen)


def _hub(config: StatsConfig) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise ConfigError("stats=hub wants the package `datasets` - it is not installed - pip install 'editkit[hub]'.") from None
    where = f"{config.path}, subset {config.subset}, split {config.split}"
    try:
        dataset = datasets.load_dataset(config.path, config.subset, split=config.split)
    except Exception as error:  # the hub's client raises many kinds, and for the user they are one
        raise ConfigError(f"stats.path cannot be loaded from the hub - {where} ({error}) - or use stats=text stats.path=FILE.") from None
    if config.column not in dataset.column_names:
        raise ConfigError(f"stats.column is not in {where} - got {config.column} - columns: {', '.join(dataset.column_names)}.")
    sample = dataset.shuffle(seed=config.seed).select(range(min(config.num_documents, len(dataset))))
    yield from sample[config.column]
