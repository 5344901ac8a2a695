"""Running text and generated text: perplexity by hand, entropies of the textbook, likeness of
texts.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.evaluation.base import Samples
from editkit.evaluation.fluency import Fluency, TfIdf, fluency, ngram_entropy
from editkit.evaluation.perplexity import Perplexity, _ratio_stderr
from editkit.model.tokens import encode
from editkit.records.means import mean_and_stderr
from editkit.types import Measurement
from tests.support.bigram import Bigram
from tests.support.helpers import KINDS, Kind, request, tiny_model

TEXT = "The mother tongue of Léon Blum is French. Paris is in France, and Rome is not. " * 6


def perplexity(path: Path, **changes: Any) -> Perplexity:
    return Perplexity(**({"path": str(path), "max_tokens": None, "window": 512} | changes))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "some.txt").write_text(TEXT)
    return tmp_path / "some.txt"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [True, False])
def test_perplexity_is_that_of_each_window_run_alone(kind: Kind, bos: bool, text: Path) -> None:
    model = tiny_model(kind, bos=bos)
    encoded = encode(model.tokenizer, [TEXT])[0]
    special, ids = encoded.ids[: encoded.num_special], encoded.ids[encoded.num_special :][:100]
    losses: list[float] = []
    for start in range(0, len(ids), 16 - len(special)):
        window = special + ids[start : start + 16 - len(special)]
        with torch.no_grad():
            logits_TV = model.network(input_ids=torch.tensor([window])).logits[0, :-1].double()
        predicted_T = torch.tensor(window[1:])
        losses += (-logits_TV.log_softmax(-1).gather(-1, predicted_T[:, None])[:, 0]).tolist()
    (found,) = perplexity(text, max_tokens=100, window=16).evaluate(model, (), {})
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (found.kind, found.metric, found.task, found.nonfinite) == (
        "language",
        "perplexity_per_token",
        "some",
        0,
    )
    assert found.stderr is not None and found.n == -(-len(ids) // (16 - len(special)))
    (in_small_batches,) = perplexity(text, max_tokens=100, window=16, tokens_per_batch=1).evaluate(
        model, (), {}
    )
    assert in_small_batches.value == pytest.approx(found.value, rel=1e-5)


def test_a_uniform_model_is_as_perplexed_as_it_has_tokens(text: Path) -> None:
    model: Any = Bigram()
    (found,) = perplexity(text, window=20).evaluate(model, (), {})
    assert found.value == pytest.approx(len(model.tokenizer))
    model.logits_VV[:] = torch.nan
    (lost,) = perplexity(text, window=20).evaluate(model, (), {})
    assert (lost.value, lost.stderr, lost.nonfinite) == (None, None, lost.n)


def test_a_window_counts_by_its_tokens_in_the_standard_error_too(text: Path) -> None:
    def stderr(losses: list[float], counts: list[int]) -> float:
        mean = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
        return _ratio_stderr(losses, counts, mean) or 0.0

    losses = [4.0, 5.0, 4.5, 5.5]
    assert stderr(losses, [9] * 4) == pytest.approx(mean_and_stderr(losses)[1])
    assert stderr([4.0, 4.1, 9.0], [1000, 1000, 1]) < 0.1 < stderr([4.0, 4.1, 9.0], [1000] * 3)
    assert (
        _ratio_stderr([4.0], [9], 4.0) is None
        and _ratio_stderr([4.0, math.nan], [9, 9], math.nan) is None
    )
    model = tiny_model()
    ids = encode(model.tokenizer, [TEXT])[0]
    (found,) = perplexity(text, window=50).evaluate(model, (), {})
    assert found.value is not None and found.stderr is not None and len(ids.ids) % 50 not in (0, 1)
    assert found.stderr < found.value


def test_a_folders_texts_are_read_in_the_order_of_their_names_and_what_is_no_text_is_an_error(
    tmp_path: Path,
) -> None:
    (tmp_path / "b.txt").write_text("Rome")
    (tmp_path / "a.raw").write_text("Paris is in")
    (tmp_path / "c.json").write_text("{}")
    model = tiny_model()
    (found,) = perplexity(tmp_path).evaluate(model, (), {})
    (tmp_path / "all.txt").write_text("Paris is in\nRome")
    (same,) = perplexity(tmp_path / "all.txt").evaluate(model, (), {})
    assert (found.value, found.n) == (same.value, 1)
    with pytest.raises(ConfigError, match=r"path: no text there \(got '.*none'"):
        perplexity(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"window: out of range \(got 1; expected at least 2"):
        perplexity(tmp_path, window=1)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match="no text there"):
        perplexity(tmp_path / "empty.txt").evaluate(model, (), {})
    assert Perplexity(path=None, max_tokens=None, window=8).evaluate(model, (), {}) == []


def test_entropies_are_the_textbooks_with_the_papers_weights() -> None:
    words = ["a", "b", "a", "b", "c"]  # ab ba ab bc; aba bab abc
    bigrams = -(0.5 * math.log2(0.5) + 2 * 0.25 * math.log2(0.25))
    assert ngram_entropy(words, 2) == pytest.approx(bigrams)
    assert ngram_entropy(words, 3) == pytest.approx(math.log2(3))
    assert fluency(["a b a b c"]) == pytest.approx((2 / 3 * bigrams + 4 / 3 * math.log2(3)) / 2)
    assert fluency(["x x x x x x x", "", "one"]) == 0.0
    assert fluency(["a b a b c", "x"]) == pytest.approx(fluency(["a b a b c"]) / 2)


def test_likeness_is_the_cosine_of_weighted_words() -> None:
    tf_idf = TfIdf.of(["rome is old", "paris is old", "paris is large"])
    assert tf_idf.cosine("Paris, paris!", "PARIS") == pytest.approx(1.0)
    assert tf_idf.cosine("rome", "paris") == 0.0 and tf_idf.cosine("", "paris") == 0.0
    paris, is_ = math.log(4 / 3) + 1, math.log(4 / 4) + 1
    assert tf_idf.cosine("paris is", "paris") == pytest.approx(paris / math.hypot(paris, is_))


def test_texts_are_drawn_alike_at_every_milestone_and_kept() -> None:
    model = tiny_model()
    requests = [dataclasses.replace(request(index), id=f"r/{index}") for index in range(3)]
    requests[0] = dataclasses.replace(
        requests[0],
        references=("Paris is in France.",),
        generation_prompts=("Paris is", "Paris is"),
    )
    evaluator = Fluency(limit=2, max_tokens=20, top_k=5, seed=0)
    baseline = evaluator.baseline(model, requests)

    def measured(count: int) -> tuple[dict[str, Measurement], list[dict[str, Any]]]:
        found = evaluator.evaluate(model, requests[:count], baseline)
        (samples,) = (each for each in found if isinstance(each, Samples))
        return {each.metric: each for each in found if isinstance(each, Measurement)}, [
            dict(row) for row in samples.rows
        ]

    all_metrics, rows = measured(3)
    assert {metric: each.n for metric, each in all_metrics.items()} == {
        "fluency_bits": 2,
        "consistency": 1,
    }
    assert all_metrics["fluency_bits"].value == pytest.approx(
        sum(fluency(row["texts"]) for row in rows) / 2
    )
    assert [len(row["texts"]) for row in rows] == [2, 1], (
        "a request without prompts for it is continued from its own"
    )
    assert (
        rows[0]["texts"][0].startswith("Paris is") and rows[0]["texts"][0] != rows[0]["texts"][1]
    ), "draws of its own"
    assert (
        rows[1]["texts"][0].startswith(requests[1].full_prompt) and rows[1]["consistency"] is None
    )
    said = {(each.max_tokens, each.max_new_tokens) for each in all_metrics.values()}
    assert said == {(20, None)}, "the prompt counts among a text's tokens"
    assert measured(1)[1] == rows[:1], "the draws do not depend on how many requests there are"
    assert measured(1)[0]["consistency"].value == all_metrics["consistency"].value
    with pytest.raises(ConfigError, match=r"max_tokens: out of range \(got 1"):
        Fluency(limit=None, max_tokens=1, top_k=5, seed=0)
