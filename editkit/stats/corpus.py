"""The texts that second moments are taken over: the bundled world's, a text file's, or a hub
dataset's.

`preset: minimal` takes few of them: ten key vectors for each dimension of a key, after Gupta et al.
2025 ("FastMEMIT", arXiv 2506.04226), where published statistics hold thousands. An update then
still differs from the full one's by 40 % or so on the bundled models (for independent Gaussian keys
it is the root of one over the ten); `editkit stats compare` measures it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from editkit.errors import ConfigError
from editkit.stats.collect import Products

COUNTED_AT_ONCE = 100  # documents


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """Where the texts come from, how many, and where the statistics are stored."""

    name: str
    source: Literal["world", "text", "hub", "none"]
    preset: Literal[
        "full", "minimal"
    ]  # minimal: of the documents only as many as give `vectors_per_dimension`
    vectors_per_dimension: int  # key vectors for each dimension of a key
    path: str | None = None  # text: a file, or a folder of .txt files; hub: the dataset's id
    # text: what stands between two documents; None: a file is one document
    separator: str | None = "\n"
    subset: str | None = None  # hub: the dataset's configuration
    split: str = "train"  # hub
    column: str = "text"  # hub
    num_documents: int
    seed: int  # of the sample
    # tokens of a document that count; the model's own number of positions if that is smaller
    context_length: int
    batch_tokens: int  # tokens of a forward pass, padding included
    # what k k^T is multiplied in (float64 for a float64 network and float32); sums are float64
    products: Products
    save_every_s: float  # seconds between two saved states of unfinished sums
    folder: str

    def __post_init__(self) -> None:
        positive = ("num_documents", "vectors_per_dimension", "context_length", "batch_tokens")
        problems = [
            f"stats.{name} must be positive - got {getattr(self, name)}."
            for name in positive
            if getattr(self, name) < 1
        ]
        if self.context_length > self.batch_tokens:
            problems.append(
                "stats.batch_tokens must hold a document of stats.context_length - got "
                f"stats.context_length={self.context_length}, "
                f"stats.batch_tokens={self.batch_tokens}."
            )
        if self.save_every_s < 0:
            problems.append(f"stats.save_every_s must not be negative - got {self.save_every_s}.")
        if self.separator == "":
            problems.append(
                "stats.separator must not be empty - null makes each file one document."
            )
        if self.source in ("text", "hub") and not self.path:
            what = (
                "a text file or a folder of .txt files"
                if self.source == "text"
                else "a dataset's id on the hub"
            )
            problems.append(f"stats.path is missing - stats={self.source} wants {what} there.")
        if problems:
            raise ConfigError(problems)


def texts(config: StatsConfig) -> Iterator[str]:
    """The sampled documents, the same ones in the same order each time. Raises ConfigError where
    the source cannot be read.
    """
    if config.source == "world":
        from editkit.datasets.world import corpus, generate_world

        yield from corpus(generate_world(), seed=config.seed, num_documents=config.num_documents)
    elif config.source == "text":
        yield from _sample(
            _documents(Path(config.path or "").expanduser(), config.separator), config
        )
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


def fewest(
    documents: Sequence[str],
    *,
    num_tokens: int,
    count_tokens: Callable[[Sequence[str]], Sequence[int]],
    seed: int,
) -> list[str]:
    """As few of the documents, drawn at random and left in their order, as hold `num_tokens`
    tokens; all, where these hold fewer.
    """
    drawn = random.Random(seed).sample(range(len(documents)), len(documents))
    found = 0
    for start in range(0, len(drawn), COUNTED_AT_ONCE):
        counts = count_tokens(
            [documents[index] for index in drawn[start : start + COUNTED_AT_ONCE]]
        )
        for number, count in enumerate(counts, start + 1):
            found += count
            if found >= num_tokens:
                return [documents[index] for index in sorted(drawn[:number])]
    return list(documents)


def _documents(path: Path, separator: str | None) -> list[str]:
    """With "\\n" every line that is not blank is a document, as for the `text` loader of Hugging
    Face datasets.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        whole = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"stats.path cannot be read - {path} ({error}) - a UTF-8 text file or a folder of "
            ".txt files."
        ) from None
    separator = (
        separator.replace("\\n", "\n") if separator else None
    )  # Hydra takes a backslash on the command line as it is
    if separator == "\n":
        pieces = [line for text in whole for line in text.splitlines()]
    else:
        pieces = [
            piece.strip()
            for text in whole
            for piece in ([text] if separator is None else text.split(separator))
        ]
    if not (found := [piece for piece in pieces if piece.strip()]):
        raise ConfigError(
            f"stats.path holds no text - {path} - a UTF-8 text file, or a folder of .txt files, "
            "with documents in it."
        )
    return found


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
        raise ConfigError(
            "stats=hub wants the package `datasets` - it is not installed - pip install datasets."
        ) from None
    where = f"{config.path}, subset {config.subset}, split {config.split}"
    try:
        dataset = datasets.load_dataset(config.path, config.subset, split=config.split)
    except Exception as error:  # the hub's client raises many kinds, and for the user they are one
        raise ConfigError(
            f"stats.path cannot be loaded from the hub - {where} ({error}) - or use stats=text "
            "stats.path=FILE."
        ) from None
    if config.column not in dataset.column_names:
        raise ConfigError(
            f"stats.column is not in {where} - got {config.column} - columns: "
            f"{', '.join(dataset.column_names)}."
        )
    sample = dataset.shuffle(seed=config.seed).select(
        range(min(config.num_documents, len(dataset)))
    )
    yield from sample[config.column]
