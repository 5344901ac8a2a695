"""Positions, targets and padding with byte-level (GPT-2) and sentencepiece tokenizers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.model.capture import capture
from editkit.model.tokens import (
    encode,
    encode_prompts,
    encode_with_target,
    encode_with_targets,
    fill,
    pad,
    require_offsets,
    subject_position,
    target_ids,
)
from editkit.types import Probe
from tests.support.helpers import KINDS, real_data, tiny_model, tiny_tokenizer
from tests.support.tokenizers import STYLES, styled_tokenizer

TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt2": {"kind": "gpt2"},
    "gpt2, BOS": {"kind": "gpt2", "bos": True},
    "gpt2, trimmed offsets": {"kind": "gpt2", "trim_offsets": True},
    "sentencepiece": {"kind": "llama"},
    "sentencepiece, no BOS": {"kind": "llama", "bos": False},
}
FILLED = {
    "in the middle": ("The mother tongue of {} is", "Danielle Darrieux", "{}"),
    "at the start": ("{} speaks", "Léon Blum", "{}"),
    "at the start of one letter": ("{} is a letter", "X", "{}"),
    "at the end": ("Who was {}", "Édouard Daladier", "{}"),
    "followed by 's": ("{}'s headquarters are in", "Apple", "{}"),
    "with an apostrophe": ("The team of {} is", "O'Neal", "{}"),
    "with unicode at its end": ("{} is spoken in", "日本語", "The guitar. {}"),
    "within its own text": ("Paris, like {}, is a name; Paris is", "Paris", "Paris is Paris. {}"),
    "with braces": ("The set {} is", "{}{x}", "{}"),
    "with blanks around": ("Now {} is", " Paris ", "{}"),
    "in a context": ("{} is located in", "Vinson Massif", "Because of it. {}"),
}


@pytest.fixture(params=[*TOKENIZERS, *STYLES])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param in STYLES:
        return styled_tokenizer(request.param)
    return tiny_tokenizer(**TOKENIZERS[request.param])


@pytest.mark.parametrize("case", FILLED)
def test_the_subject_position_is_the_token_that_completes_the_subject(
    tokenizer: Any, case: str
) -> None:
    prompt, subject, context = FILLED[case]
    filled = fill(prompt, subject, context=context)
    assert filled.text == context.replace("{}", prompt.replace("{}", "\0")).replace("\0", subject)
    assert filled.text[filled.subject_start : filled.subject_end] == subject.strip()
    encoded = encode(tokenizer, [filled.text])[0]
    position = subject_position(encoded, filled)
    upto, before = (
        tokenizer.decode(list(encoded.ids[:end]), skip_special_tokens=True)
        for end in (position + 1, position)
    )
    assert upto.lstrip().startswith(filled.text[: filled.subject_end].lstrip())
    assert not before.lstrip().startswith(filled.text[: filled.subject_end].lstrip())


def test_a_suffix_that_merges_with_the_subject_is_part_of_its_token(tokenizer: Any) -> None:
    filled = fill("In the {}ish language", "Engl")
    encoded = encode(tokenizer, [filled.text])[0]
    start, end = encoded.spans[subject_position(encoded, filled)]
    assert start < filled.subject_end <= end


@pytest.mark.parametrize(
    ("prompt", "context"),
    [("no place", "{}"), ("{} and {}", "{}"), ("{} is", "TEXT."), ("{} is", "{} {}")],
)
def test_templates_need_exactly_one_place(prompt: str, context: str) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        fill(prompt, "Paris", context=context)


@pytest.mark.parametrize("prompt", ["The capital of France is", "The capital of France is  "])
@pytest.mark.parametrize(
    "target", ["Paris", " Paris", "  Paris", "日本語", "O'Neal", "the city of Rome"]
)
def test_a_target_begins_with_exactly_one_blank_and_holds_no_bos(
    tokenizer: Any, prompt: str, target: str
) -> None:
    sequence = encode_with_target(tokenizer, prompt, target)
    start, end = sequence.start, len(sequence.ids)
    assert sequence.predicting == slice(start - 1, end - 1)
    assert not set(sequence.target_ids) & set(tokenizer.all_special_ids)
    whole, before = (
        tokenizer.decode(list(ids), skip_special_tokens=True)
        for ids in (sequence.ids, sequence.ids[:start])
    )
    assert whole.lstrip() == f"The capital of France is {target.strip()}"
    assert before.lstrip() == "The capital of France is"


def test_a_sentencepiece_target_has_no_stray_blank_piece() -> None:
    tokenizer = tiny_tokenizer("llama")
    assert tokenizer.convert_ids_to_tokens(
        list(target_ids(tokenizer, "The capital of France is", "Paris"))
    ) == ["\u2581Paris"]


def test_bos_comes_once_and_an_eos_is_dropped() -> None:
    from tokenizers import processors

    tokenizer = tiny_tokenizer("llama")
    (ids,) = encode_prompts(tokenizer, ["Paris is"])
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert encode_prompts(tokenizer, ["Paris is"]) == [ids]


def test_an_impossible_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="blank"):
        encode_with_target(tiny_tokenizer("gpt2"), "Paris is", "  ")
    with pytest.raises(ConfigError, match="no token precedes"):
        encode_with_target(tiny_tokenizer("gpt2"), "", "Paris")
    assert encode_with_target(tiny_tokenizer("llama"), "", "Paris").start == 1


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="slow tokenizer"):
        require_offsets(Slow())


PROMPTS = [
    ("The mother tongue of {} is", "Danielle Darrieux", "English"),
    ("{} is in", "Apple", "Rome"),
    ("{}'s team plays in", "O'Neal", "Los Angeles"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("tied", [False, True])
def test_padding_changes_neither_keys_nor_losses(
    kind: Any, bos: bool, side: Any, tied: bool
) -> None:
    model = tiny_model(kind, bos=bos, tied=tied)
    module = model.family.down_projection(1)
    filled = [fill(prompt, subject) for prompt, subject, _ in PROMPTS]
    sequences = [
        encode_with_target(model.tokenizer, place.text, target)
        for place, (*_, target) in zip(filled, PROMPTS, strict=True)
    ]
    positions = [
        subject_position(sequence, place) for sequence, place in zip(sequences, filled, strict=True)
    ]
    assert all(sequence.ids[0] != model.tokenizer.bos_token_id for sequence in sequences) != bos

    def keys_and_losses(rows: list[int], side: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        batch = pad([sequences[row].ids for row in rows], side=side)
        with torch.no_grad(), capture(model, inputs=[module], stop_after_last=False) as captured:
            hidden_BTD = model.final_hidden(batch)
        columns = batch.columns([positions[row] for row in rows])
        results = []
        for index, row in enumerate(rows):
            predicting = sequences[row].predicting
            shift = int(batch.first_B[index])
            logits = model.hidden_to_logits(
                hidden_BTD[index, predicting.start + shift : predicting.stop + shift]
            )
            losses = torch.nn.functional.cross_entropy(
                logits, torch.tensor(sequences[row].target_ids), reduction="none"
            )
            results.append((captured.inputs[module][index, columns[index]], losses))
        return results

    for together, alone in zip(
        keys_and_losses([0, 1, 2], side),
        [keys_and_losses([row], "right")[0] for row in range(3)],
        strict=True,
    ):
        for mine, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_equal_those_of_a_direct_call_of_the_network(kind: Any) -> None:
    model = tiny_model(kind)
    sequence = encode_with_target(model.tokenizer, "The capital of France is", "the city of Rome")
    batch = pad([sequence.ids], side="left")
    with torch.no_grad():
        plain = (
            model.network(torch.tensor([sequence.ids]))
            .logits[0]
            .log_softmax(-1)[sequence.predicting]
        )
        ours = model.hidden_to_logits(
            model.final_hidden(batch)[0, sequence.predicting]
        ).log_softmax(-1)
    torch.testing.assert_close(ours, plain)


def test_padding_ids_are_valid_without_a_pad_token() -> None:
    tokenizer = tiny_tokenizer("gpt2")
    assert tokenizer.pad_token_id is None
    batch = pad([(5, 6, 7), (8,)], side="left")
    assert batch.mask_BT.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch.position_ids_BT.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.columns([2, 0]).tolist() == [2, 2]
    assert 0 <= int(batch.ids_BT.min()) <= int(batch.ids_BT.max()) < len(tokenizer)


def real_tokenizer(name: str) -> Any:
    """GPT-2's own vocabulary, or the small sentencepiece one of a real Llama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name == "llama":
        return AutoTokenizer.from_pretrained(real_data("models/stories260k-hf"))
    folder = real_data("tokenizers/gpt2")
    backend = Tokenizer(
        models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


@pytest.mark.data
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_every_subject_and_target_of_counterfact_is_found(name: str) -> None:
    records = json.loads(real_data("counterfact/counterfact_filtered.json").read_text())
    rewrites = [record["requested_rewrite"] for record in records]
    tokenizer = real_tokenizer(name)
    filled = [
        fill(rewrite["prompt"], rewrite["subject"], context="The first thing. {}")
        for rewrite in rewrites
    ]
    targets = [rewrite["target_new"]["str"] for rewrite in rewrites]
    sequences = encode_with_targets(
        tokenizer,
        [
            Probe(prompt=place.text, answer=target)
            for place, target in zip(filled, targets, strict=True)
        ],
    )

    def text(ids: tuple[int, ...]) -> str:
        return str(
            tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        ).lstrip()

    for place, target, sequence in zip(filled, targets, sequences, strict=True):
        position = subject_position(sequence, place)
        upto_subject = place.text[: place.subject_end]
        assert text(sequence.ids[: position + 1]).startswith(upto_subject)
        assert not text(sequence.ids[:position]).startswith(upto_subject)
        assert text(sequence.ids[: sequence.start]) == place.text.rstrip()
        assert text(sequence.ids) == f"{place.text.rstrip()} {target}"
