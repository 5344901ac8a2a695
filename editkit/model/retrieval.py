"""Looking texts up: BM25, or the cosine of a sentence encoder's embeddings.

    bm25    s(q, t) / s(t, t)    s: BM25 with Lucene's idf, k1 1.5 and b 0.75 (bm25s)
    else    cos(e(q), e(t))      e: the sentence encoder, through sentence-transformers

The first is 1 for the text itself, as the second is: a threshold then says how much of a text a
query has to repeat. BM25 ranks by s alone. Of texts that are equally similar, the older one is
nearer.

An encoder runs one text at a time, so that a query's batch changes no similarity.

Shape letters: N texts, E width of an embedding (0 for BM25).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from editkit.datasets.separators import writes_no_blanks
from editkit.errors import ConfigError, message
from editkit.lazy import missing_packages, torch
from editkit.model.source import KEY, find_source

if TYPE_CHECKING:
    import numpy

BM25 = "bm25"
INSTALL = "pip install 'editkit[retrieval]'"
# Characters at the end of a longer query that an encoder reads. Encoders drop what exceeds their
# own length (all-MiniLM-L6-v2: 256 tokens) from the end, where a prompt asks its question.
LONGEST_QUERY = 800
Found = tuple[int, float]  # which text, and how similar it is


@dataclass(frozen=True, kw_only=True)
class Retriever:
    """A way to look texts up.

    Attributes:
        name: `bm25`, or a sentence encoder as `model.id` names models: a hub id, a folder, or
            `package:<module>/<folder>`.
    """

    name: str
    # Functions of texts that are computed once: the latest index, the encoder, its embeddings.
    _kept: dict[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    _embedded: dict[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def problems(self) -> list[str]:
        """Why it cannot be used, as far as this machine shows it without reading weights. The key
        of the messages is `retriever`.
        """
        package = "bm25s" if self.name == BM25 else "sentence_transformers"
        problems = []
        if missing_packages([package]):
            problem = f"needs the package {package.replace('_', '-')}"
            problems.append(message("retriever", problem, got=self.name, fix=INSTALL))
        if self.name != BM25:
            try:
                find_source(self.name)
            except ConfigError as error:
                problems += [
                    "retriever" + problem.removeprefix(KEY) if problem.startswith(KEY) else problem
                    for problem in error.problems
                ]
        return problems

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """(N, E) float32 of length 1, on the CPU; (N, 0) for BM25.

        Raises:
            ConfigError: the encoder cannot be loaded.
        """
        if self.name == BM25 or not texts:
            return torch.zeros(len(texts), 0 if self.name == BM25 else self._width)
        new = [text for text in dict.fromkeys(texts) if text not in self._embedded]
        if new:
            vectors_NE = self._encoder.encode(
                [text[-LONGEST_QUERY:] for text in new],
                batch_size=1,
                convert_to_tensor=True,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
            self._embedded.update(zip(new, vectors_NE.float().cpu(), strict=True))
        return torch.stack([self._embedded[text] for text in texts])

    def nearest(
        self, query: str, texts: Sequence[str], keys_NE: torch.Tensor, count: int
    ) -> list[Found]:
        """The `count` most similar texts, the most similar first; all, if there are fewer.

        Args:
            keys_NE: `embed(texts)`.
        """
        if self.name == BM25:
            return self._index(texts).nearest(query, count)
        if not texts:
            return []
        [query_E] = self.embed([query])
        cosines_N = keys_NE.cpu() @ query_E
        order = torch.sort(cosines_N, descending=True, stable=True).indices[:count]
        return [(index, float(cosines_N[index])) for index in order.tolist()]

    @property
    def _width(self) -> int:
        return len(self.embed(["."])[0])

    @property
    def _encoder(self) -> Any:
        if "encoder" not in self._kept:
            from sentence_transformers import SentenceTransformer

            from editkit.model.hub import quietly

            source = find_source(self.name)
            try:
                with quietly():
                    self._kept["encoder"] = SentenceTransformer(
                        source.place, device="cpu", local_files_only=source.is_folder
                    )
            except (OSError, ValueError, KeyError) as error:
                problem = f"the sentence encoder cannot be loaded ({str(error).splitlines()[0]})"
                expected = "a folder or hub id of a sentence-transformers model"
                raise ConfigError(
                    message("editor.retriever", problem, got=self.name, expected=expected)
                ) from None
        return self._kept["encoder"]

    def _index(self, texts: Sequence[str]) -> _Index:
        key = tuple(texts)
        if self._kept.get("texts") != key:
            self._kept.update(texts=key, index=_Index(key))
        index: _Index = self._kept["index"]
        return index


class _Index:
    """BM25 over some texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        import bm25s

        self.words = [_words(text) for text in texts]
        self.index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        self.has_words = any(self.words)
        if self.has_words:
            logging.getLogger("bm25s").setLevel(logging.WARNING)  # it tells of every index
            self.index.index(self.words, show_progress=False)

    def scores(self, words: Sequence[str]) -> numpy.ndarray:
        found: numpy.ndarray = self.index.get_scores(list(words))
        return found

    def nearest(self, query: str, count: int) -> list[Found]:
        import numpy

        words = _words(query)
        if not self.has_words or not words:
            return [(index, 0.0) for index in range(min(count, len(self.words)))]
        scores = self.scores(words)
        order = numpy.argsort(-scores, kind="stable")[:count].tolist()
        return [(index, self._share(index, float(scores[index]))) for index in order]

    def _share(self, index: int, score: float) -> float:
        own = float(self.scores(self.words[index])[index]) if self.words[index] else 0.0
        return score / own if own else 0.0


def _words(text: str) -> list[str]:
    """The words of a text in small letters; of scripts without blanks, single letters."""
    words: list[str] = []
    for word in re.findall(r"\w+", text.lower()):
        words += word if any(map(writes_no_blanks, word)) else [word]
    return words
