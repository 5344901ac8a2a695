"""The texts for second moments: of the bundled world or facts, text files, or a dataset of the
hub. Imported second moments have no texts (`editkit.stats.imported`).

`preset: minimal` uses few texts: ten key vectors for each dimension of a key, after Gupta et al.
2025 ("FastMEMIT", arXiv 2506.04226). Published statistics have thousands. On the bundled models, an
update with the minimal preset differs from that with the full one by about 40 %. For independent
Gaussian keys the difference is the square root of 1/10. `editkit stats compare` measures it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from editkit.errors import ConfigError, OptionError, message
from editkit.stats.collect import Products
from editkit.stats.remote import form_problems

COUNTED_AT_ONCE = 100  # documents whose tokens are counted together


@dataclass(frozen=True, kw_only=True)
class StatsConfig:
    """The source and number of the texts, and the folder of the statistics."""

    name: str
    source: Literal["world", "facts", "text", "hub", "imported", "none"]
    # minimal: only as many documents as `vectors_per_dimension` requires
    preset: Literal["full", "minimal"]
    vectors_per_dimension: int  # key vectors for each dimension of a key
    # text: a file, or a folder of .txt files; hub: the dataset's id; imported: a published file or
    # a folder of them, or None for the newest import of each matrix
    path: str | None = None
    # text: the separator of documents; None: each file is one document
    separator: str | None = "\n"
    subset: str | None = None  # hub: the dataset's configuration
    split: str = "train"  # hub
    column: str = "text"  # hub
    num_documents: int
    seed: int  # of the sample
    # tokens of a document that count; at most the model's context length
    context_length: int
    batch_tokens: int  # tokens of a forward pass, including padding
    # the dtype of the products k k^T (float32 means float64 for a float64 network); sums are
    # float64
    products: Products
    save_every_s: float  # seconds between two saves of unfinished sums
    folder: str
    # asked before second moments are computed: a folder, http(s)://... or hub:owner/name
    remote: str | None = None
    remote_timeout_s: float = 20.0  # the longest wait for an answer

    def __post_init__(self) -> None:
        positive = ("num_documents", "vectors_per_dimension", "context_length", "batch_tokens")
        problems = [
            message(name, "must be positive", got=getattr(self, name))
            for name in positive
            if getattr(self, name) < 1
        ]
        if self.context_length > self.batch_tokens:
            problems.append(
                message(
                    "batch_tokens",
                    "must not be below context_length",
                    got=self.batch_tokens,
                    expected=f"at least {self.context_length}",
                )
            )
        if self.save_every_s < 0:
            problems.append(message("save_every_s", "must not be negative", got=self.save_every_s))
        if self.remote is not None:
            problems += form_problems(self.remote)
        if self.remote_timeout_s <= 0:
            problems.append(
                message("remote_timeout_s", "must be positive", got=self.remote_timeout_s)
            )
        if self.separator == "":
            problems.append(
                message(
                    "separator",
                    "must not be empty",
                    fix="set it to null, which makes each file one document",
                )
            )
        if self.source in ("text", "hub") and not self.path:
            expected = (
                "a text file or a folder of .txt files"
                if self.source == "text"
                else "a dataset's id on the hub"
            )
            problems.append(
                message("path", f"is missing with source={self.source}", expected=expected)
            )
        if self.source == "imported" and self.preset == "minimal":
            problem = "imported second moments have no texts to draw fewer from"
            problems.append(message("preset", problem, got=self.preset, expected="full"))
        if problems:
            raise OptionError(problems)


def texts(config: StatsConfig) -> Iterator[str]:
    """The sampled documents, always the same ones in the same order. Raises ConfigError if the
    source cannot be read.
    """
    if config.source == "world":
        from editkit.datasets.world import corpus, generate_world

        yield from corpus(generate_world(), seed=config.seed, num_documents=config.num_documents)
    elif config.source == "facts":
        from editkit.datasets.facts_table import read_table, statements

        table = read_table()
        yield from statements(table, seed=config.seed, num_documents=config.num_documents)
    elif config.source == "text":
        yield from _sample(
            _documents(Path(config.path or "").expanduser(), config.separator), config
        )
    elif config.source == "hub":
        yield from _hub(config)


def digest(documents: Iterable[str]) -> str:
    """A digest of the documents' content, order and borders."""
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
    """The smallest random sample of the documents that has `num_tokens` tokens, in the documents'
    order; all documents if they have fewer tokens.
    """
    drawn = random.Random(seed).sample(range(len(documents)), len(documents))
    num_drawn = 0
    for start in range(0, len(drawn), COUNTED_AT_ONCE):
        counts = count_tokens(
            [documents[index] for index in drawn[start : start + COUNTED_AT_ONCE]]
        )
        for number, count in enumerate(counts, start + 1):
            num_drawn += count
            if num_drawn >= num_tokens:
                return [documents[index] for index in sorted(drawn[:number])]
    return list(documents)


def _documents(path: Path, separator: str | None) -> list[str]:
    """The documents of the files. With the separator "\\n", every line that is not blank is a
    document, as in the `text` loader of Hugging Face datasets.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        whole = [file.read_text(encoding="utf-8") for file in files]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            message(
                "stats.path",
                f"cannot be read: {error}",
                got=str(path),
                expected="a UTF-8 text file, or a folder of .txt files",
            )
        ) from None
    # Hydra does not interpret a backslash on the command line.
    separator = separator.replace("\\n", "\n") if separator else None
    if separator == "\n":
        pieces = [line for text in whole for line in text.splitlines()]
    else:
        pieces = [
            piece.strip()
            for text in whole
            for piece in ([text] if separator is None else text.split(separator))
        ]
    if not (documents := [piece for piece in pieces if piece.strip()]):
        raise ConfigError(
            message(
                "stats.path",
                "has no documents",
                got=str(path),
                expected="a UTF-8 text file, or a folder of .txt files, with documents",
            )
        )
    return documents


def _sample(documents: Sequence[str], config: StatsConfig) -> Iterator[str]:
    """A sample of `num_documents` documents, or all if there are fewer, in their order."""
    chosen: Sequence[int] = range(len(documents))
    if config.num_documents < len(documents):
        chosen = sorted(random.Random(config.seed).sample(chosen, config.num_documents))
    return (documents[index] for index in chosen)


def _hub(config: StatsConfig) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            message(
                "stats",
                "the package `datasets` is not installed",
                got="hub",
                fix="pip install datasets",
            )
        ) from None
    where = f"{config.path}, subset {config.subset}, split {config.split}"
    try:
        dataset = datasets.load_dataset(config.path, config.subset, split=config.split)
    except Exception as error:  # the hub's client raises many kinds of errors
        raise ConfigError(
            message(
                "stats.path",
                f"cannot be loaded from the hub: {error}",
                got=where,
                fix="check the id and the network, or use stats=text stats.path=FILE",
            )
        ) from None
    if config.column not in dataset.column_names:
        raise ConfigError(
            message(
                "stats.column",
                f"is not a column of {where}",
                got=config.column,
                expected=f"one of {', '.join(dataset.column_names)}",
            )
        )
    sample = dataset.shuffle(seed=config.seed).select(
        range(min(config.num_documents, len(dataset)))
    )
    yield from sample[config.column]
