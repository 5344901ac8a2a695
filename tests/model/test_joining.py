"""Prompt and target are joined in one place, as the prompt's end or a choice demands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import editkit
from editkit.datasets.separators import lead_of
from editkit.model.split import split_of
from editkit.model.tokens import (
    encode_prompts,
    encode_with_target,
    encode_with_targets,
    fill,
    subject_position,
)
from editkit.types import EditRequest, Probe
from tests.support.chinese import REQUEST, chinese_tokenizer
from tests.support.helpers import tiny_tokenizer
from tests.support.tokenizers import STYLES, styled_tokenizer

# The last style cannot spell Chinese: unknown letters become one token.
TOKENIZERS = ("gpt2", "llama", "chinese", *(style for style in STYLES if style != "unigram"))
PROBES = (
    Probe(prompt="法国的首都是", answer="柏林"),
    Probe(prompt="日本の首都は", answer=" 東京です"),
    Probe(prompt='He said "', answer="Paris is"),
    Probe(prompt="The answer (", answer="Rome"),
    Probe(prompt="Question: who?\n", answer="Léon Blum"),
    Probe(prompt="Paris is", answer="Rome", separator=""),
    Probe(prompt="Paris is", answer="Rome", separator="\n"),
)


def tokenizer_of(name: str) -> Any:
    if name == "chinese":
        return chinese_tokenizer()
    return tiny_tokenizer(name) if name in ("gpt2", "llama") else styled_tokenizer(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_without_a_blank_the_target_follows_the_tokens_that_a_generation_begins_with(
    name: str,
) -> None:
    tokenizer = tokenizer_of(name)
    sequences = encode_with_targets(tokenizer, PROBES)
    leads = encode_prompts(tokenizer, list(map(lead_of, PROBES)))
    for probe, sequence, lead in zip(PROBES, sequences, leads, strict=True):
        assert sequence.ids[: sequence.start] == lead
        whole = tokenizer.decode(list(sequence.ids), skip_special_tokens=True)
        before = tokenizer.decode(list(lead), skip_special_tokens=True)
        assert whole.removeprefix(before) == probe.answer.strip()
        assert whole.lstrip() == lead_of(probe) + probe.answer.strip()
        spans = sequence.encoded.spans
        assert spans[sequence.start][0] == len(lead_of(probe)), "the spans are of the whole text"
        assert spans[-1][1] == len(lead_of(probe)) + len(probe.answer.strip())


def test_a_token_may_not_cross_the_border() -> None:
    tokenizer = chinese_tokenizer()
    plain = tokenizer("首都:法国柏林")["input_ids"]
    sequence = encode_with_target(tokenizer, "首都:法国", "柏林")
    assert list(sequence.ids) != plain, "the tokenizer has a token of prompt and target"
    assert tokenizer.decode(list(sequence.target_ids)) == "柏林"
    forced = encode_with_target(tokenizer, "首都:法国", "柏林", separator=" ")
    assert tokenizer.decode(list(forced.target_ids)) == " 柏林"


def test_the_subject_is_found_where_nothing_stands_between() -> None:
    tokenizer = chinese_tokenizer()
    place = fill(REQUEST.prompt, REQUEST.subject)
    sequence = encode_with_target(tokenizer, place.text, REQUEST.target)
    position = subject_position(sequence, place)
    assert tokenizer.decode(list(sequence.ids[: position + 1])) == "首都:法国"
    assert tokenizer.decode(list(sequence.ids[:position])) == "首都:"


def test_the_split_shows_where_the_target_begins() -> None:
    tokenizer = chinese_tokenizer()
    assert split_of(tokenizer, REQUEST) == "'首都' ':' ['法国'] -> '柏林'"
    forced = EditRequest(id="x", prompt="{}是", subject="京", target="b", separator=" ")
    assert split_of(tokenizer, forced).endswith(" -> ' ' 'b'") or " -> ' b'" in split_of(
        tokenizer, forced
    )
    llama = tiny_tokenizer("llama")
    english = EditRequest(id="x", prompt="In {}", subject="日", target="Paris")
    assert split_of(llama, english).startswith("<s> ") and "['日' x3]" in split_of(llama, english)


def test_nobody_else_joins_a_prompt_and_a_target() -> None:
    """A prompt in braces and, after a blank or nothing, another value in the same text."""
    pattern = re.compile(r"f\"[^\"]*\{[\w.\[\]]*prompt(\.text)?\} ?\{[^}]*(target|answer)")
    root = Path(editkit.__file__).parent
    found = {str(path.relative_to(root)) for path in root.rglob("*.py")}
    found = {name for name in found if pattern.search((root / name).read_text())}
    assert found == {"datasets/world_tasks.py"}, "its texts are a corpus, not requests"
