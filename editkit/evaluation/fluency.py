"""Generated texts of edited models: how varied they are, and how similar to texts about the new
fact.

    fluency_bits   (2/3 H_2 + 4/3 H_3) / 2, with H_n the entropy in bits of the n-grams of one
                   request's texts (Zhang et al. 2018, arXiv 1809.05972; weights of Meng et al.
                   2022, arXiv 2202.05262). It falls towards 0 for a model that repeats itself.
                   Tables of the literature print a hundred times this.
    consistency    cosine of the TF-IDF vectors of the generated texts and of the references, each
                   joined (Meng et al. 2022, "reference score"), in [0, 1]. Only for requests with
                   references.

Texts are sampled from the `top_k` most probable tokens, as in Meng et al.'s code, up to
`max_tokens` tokens with the prompt. The draws are the same at every milestone. Requests without
generation prompts are continued from their own prompt, as in EasyEdit. Differs from the authors'
code: words are those of NLTK's Treebank tokenizer without a sentence splitter, which would need a
download; inverse document frequencies are those of the run's own references instead of Wikipedia's.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from editkit.datasets.separators import joined, lead_of
from editkit.errors import OptionError, message
from editkit.evaluation.base import AbstractEditEvaluator, Moment, Samples
from editkit.evaluation.scoring.frozen_text import from_bytes, to_bytes
from editkit.lazy import missing_packages, torch
from editkit.model.generate import decode, generate
from editkit.model.tokens import encode_prompts
from editkit.records.means import mean_and_stderr
from editkit.types import EditRequest, Measurement, Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # by n; their mean weighs 1


def ngram_entropy(words: Sequence[str], n: int) -> float:
    """The entropy of the n-grams in bits; 0 if there is none."""
    counts = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    total = sum(counts.values())
    return -math.fsum(count / total * math.log2(count / total) for count in counts.values()) + 0.0


def fluency(texts: Sequence[str]) -> float:
    """The mean of the texts' weighted entropies in bits."""
    return math.fsum(_fluency(_words(text)) for text in texts) / len(texts)


def _fluency(words: Sequence[str]) -> float:
    return math.fsum(weight * ngram_entropy(words, n) for n, weight in WEIGHTS.items()) / len(
        WEIGHTS
    )


def _words(text: str) -> list[str]:
    from nltk.tokenize import NLTKWordTokenizer

    result: list[str] = NLTKWordTokenizer().tokenize(text)
    return result


def terms(text: str) -> list[str]:
    """Words of at least two letters or digits, in lower case."""
    return re.findall(r"\b\w\w+\b", text.lower())


@dataclass(frozen=True)
class TfIdf:
    """Inverse document frequencies, smoothed: ln((1 + documents) / (1 + those with the term)) +
    1.
    """

    documents: int
    containing: Mapping[str, int]  # by term

    @classmethod
    def of(cls, texts: Iterable[str]) -> TfIdf:
        documents = [set(terms(text)) for text in texts]
        return cls(
            len(documents), Counter(sorted(term for document in documents for term in document))
        )

    def cosine(self, text: str, other: str) -> float:
        """The cosine of the two texts' vectors; 0 if a text has no term."""
        left, right = self._vector(text), self._vector(other)
        product = math.fsum(value * right.get(term, 0.0) for term, value in left.items())
        lengths = [
            math.sqrt(math.fsum(value * value for value in vector.values()))
            for vector in (left, right)
        ]
        return min(1.0, product / (lengths[0] * lengths[1])) if all(lengths) else 0.0

    def _vector(self, text: str) -> dict[str, float]:
        frequency = {
            term: math.log((1 + self.documents) / (1 + self.containing.get(term, 0))) + 1
            for term in set(terms(text))
        }
        return {
            term: count * frequency[term] for term, count in sorted(Counter(terms(text)).items())
        }


@dataclass(frozen=True, kw_only=True)
class Fluency(AbstractEditEvaluator):
    """Generated texts of the first `limit` requests."""

    # texts cost too much to be written after every edit; where all is taken back, there is no later
    is_immediate: ClassVar[bool] = False

    limit: int | None  # requests; 0: none, None: all
    max_tokens: int  # of a text, its prompt included
    top_k: int
    seed: int
    tokens_per_batch: int = 4096

    def __post_init__(self) -> None:
        least = {
            "limit": (self.limit, 0),
            "max_tokens": (self.max_tokens, 2),
            "top_k": (self.top_k, 1),
        }
        problems = [
            message(name, "out of range", got=value, expected=f"at least {limit}")
            for name, (value, limit) in least.items()
            if value is not None and value < limit
        ]
        if self.limit != 0 and missing_packages(["nltk"]):
            problems.append(
                message(
                    "limit",
                    "the entropy of generated texts needs nltk, not installed here",
                    got=self.limit,
                    expected="0",
                    fix="pip install 'editkit[tasks]', or set evaluation.fluency.limit=0",
                )
            )
        if problems:
            raise OptionError(problems)

    def baseline(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> Mapping[str, torch.Tensor]:
        """The document frequencies of all references, as JSON. They depend on all requests."""
        tf_idf = TfIdf.of(text for request in requests for text in request.references)
        return {"tf_idf": to_bytes([tf_idf.documents, dict(tf_idf.containing)])}

    def evaluate(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
    ) -> list[Measurement | Samples]:
        chosen = list(requests if self.limit is None else requests[: self.limit])
        return self._results(self._rows(model, chosen, baseline))

    def measure(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> list[Measurement | Samples]:
        return self.evaluate(model, requests, baseline)

    def note(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> dict[str, torch.Tensor]:
        """Adds the texts and scores of each request that is among the first `limit`, as JSON."""
        placed = zip(requests, moment.positions, strict=True)
        chosen = [
            request for request, position in placed if self.limit is None or position <= self.limit
        ]
        rows = self._rows(model, chosen, baseline)
        return {**notes, **{_key(moment, row["request"]): to_bytes(row) for row in rows}}

    def noted(
        self,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
        *,
        timing: str,
    ) -> list[Measurement | Samples]:
        keys = (_key(moment, request.id) for request in requests)
        results = self._results([from_bytes(notes[key]) for key in keys if key in notes])
        return [
            replace(result, timing=timing) if isinstance(result, Measurement) else result
            for result in results
        ]

    def _rows(
        self,
        model: EditableModel,
        chosen: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
    ) -> list[dict[str, Any]]:
        """The texts and scores of each request, as plain JSON values."""
        if not chosen:
            return []
        prompts = [
            list(request.generation_prompts) or [lead_of(request.probe())] for request in chosen
        ]
        texts = iter(self._texts(model, [*itertools.chain(*prompts)]))
        texts_by_request = [[next(texts) for _ in of_request] for of_request in prompts]
        fluencies = [fluency(of_request) for of_request in texts_by_request]
        tf_idf = TfIdf(*from_bytes(baseline["tf_idf"]))
        consistencies = {
            request.id: tf_idf.cosine(" ".join(of_request), " ".join(request.references))
            for request, of_request in zip(chosen, texts_by_request, strict=True)
            if request.references
        }
        return [
            {
                "request": request.id,
                "texts": of_request,
                "fluency_bits": bits,
                "consistency": consistencies.get(request.id),
            }
            for request, of_request, bits in zip(chosen, texts_by_request, fluencies, strict=True)
        ]

    def _results(self, rows: Sequence[dict[str, Any]]) -> list[Measurement | Samples]:
        if not rows:
            return []
        measurements = [self._measurement("fluency_bits", [row["fluency_bits"] for row in rows])]
        scores = [row["consistency"] for row in rows if row["consistency"] is not None]
        if scores:
            measurements.append(self._measurement("consistency", scores))
        return [*measurements, Samples(name="editing-fluency", rows=tuple(rows))]

    def _texts(self, model: EditableModel, prompts: Sequence[str]) -> list[str]:
        """Each prompt with its continuation. Equal prompts have different draws."""
        longest = min(self.max_tokens, model.max_length)
        rows = [
            ids[-(longest - 1) :]
            for ids in encode_prompts(model.tokenizer, prompts, chat=model.chat)
        ]
        generator = torch.Generator().manual_seed(self.seed)
        size = max(1, self.tokens_per_batch // longest)
        new = generate(
            model,
            rows,
            max_new_tokens=longest - 1,
            generator=generator,
            top_k=self.top_k,
            batch_size=size,
        )
        if model.chat is not None:  # the template's own words are not the model's
            answers = decode(
                model, [more[: longest - len(ids)] for ids, more in zip(rows, new, strict=True)]
            )
            pairs = zip(prompts, answers, strict=True)
            return [joined(Probe(prompt=prompt, answer=answer)) for prompt, answer in pairs]
        return decode(model, [(*ids, *more)[:longest] for ids, more in zip(rows, new, strict=True)])

    def _measurement(self, metric: str, scores: Sequence[float]) -> Measurement:
        mean, stderr = mean_and_stderr(scores)
        return Measurement(
            kind="editing",
            protocol="text",
            metric=metric,
            value=mean,
            stderr=stderr,
            n=len(scores),
            aggregation="request",
            context="{}",
            max_tokens=self.max_tokens,
        )


def _key(moment: Moment, identifier: str) -> str:
    return f"noted/{moment.view}/{identifier}"
