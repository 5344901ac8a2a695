"""Golden positions and ids of subjects and targets with the tokenizers of real models.

The real data has GPT-2's vocabulary and the sentencepiece vocabulary of a small Llama. The small
tokenizers are made here.
"""

from __future__ import annotations

from typing import Any

import pytest

from editkit.model.tokens import encode_with_target, fill, subject_position
from tests.model.test_tokens import real_tokenizer
from tests.support.helpers import tiny_tokenizer

# prompt, subject, target; then where the subject's last token is, its id, and the target's ids
GPT2 = [
    ("The mother tongue of {} is", "Danielle Darrieux", "English", 7, 2821, (3594,)),
    ("{}'s headquarters are in", "O'Neal", "New York City", 2, 40581, (968, 1971, 2254)),
    ("{} lives in", "Léon Blum", "Île-de-France", 4, 388, (6184, 236, 293, 12, 2934, 12, 28572)),
    ("What is {}?", "日本語", "the Japanese language", 8, 252, (262, 4960, 3303)),
    ("In {}, people speak", "São Tomé", "Portuguese", 4, 2634, (21813,)),
    ("{}", "Apple", "Cupertino", 0, 16108, (14496, 11766, 2879)),
]
LLAMA = [  # the first token is its BOS
    (
        "The mother tongue of {} is",
        "Danielle Darrieux",
        "English",
        24,
        444,
        (410, 459, 416, 428, 421, 293, 415),
    ),
    (
        "{}'s headquarters are in",
        "O'Neal",
        "New York City",
        6,
        421,
        (410, 458, 411, 424, 410, 452, 304, 433, 410, 457, 275, 422),
    ),
    (
        "{} lives in",
        "Léon Blum",
        "Île-de-France",
        7,
        423,
        (410, 198, 145, 305, 464, 418, 411, 464, 453, 420, 303, 331),
    ),
    (
        *("What is {}?", "日本語", "the Japanese language", 16, 161),
        (265, 410, 454, 412, 427, 303, 411, 372, 278, 303, 428, 425, 412, 428, 411),
    ),
    (
        "In {}, people speak",
        "São Tomé",
        "Portuguese",
        9,
        485,
        (410, 460, 304, 413, 425, 428, 425, 411, 372),
    ),
    ("{}", "Apple", "Cupertino", 4, 305, (410, 457, 425, 427, 285, 413, 271, 414)),
]


@pytest.mark.data
@pytest.mark.parametrize(("name", "cases"), [("gpt2", GPT2), ("llama", LLAMA)])
def test_real_tokenizers_give_the_golden_positions_and_ids(name: str, cases: list[Any]) -> None:
    tokenizer = real_tokenizer(name)
    for prompt, subject, target, position, token, ids in cases:
        place = fill(prompt, subject)
        sequence = encode_with_target(tokenizer, place.text, target)
        actual = subject_position(sequence, place)
        assert (actual, sequence.ids[actual], sequence.target_ids) == (position, token, ids), (
            prompt,
            subject,
        )
        assert tokenizer.bos_token_id not in sequence.target_ids


# The pieces are those of 400 tokens trained on eight sentences; [the subject's last token] is
# marked.
SMALL = [
    (
        "gpt2",
        "{}'s headquarters are in",
        "Apple",
        "Rome",
        "Ap [ple] 's Ġ he ad quar ter s Ġare Ġin",
        "Ġ Ro me",
    ),
    (
        "gpt2",
        "The mother tongue of {} is",
        "Léon Blum",
        "the French",
        "The Ġmother Ġtongue Ġof ĠL Ã ©on ĠB lu [m] Ġis",
        "Ġthe ĠFrench",
    ),
    ("gpt2", "{}", "O'Neal", "Paris", "O ' Ne [al]", "ĠParis"),
    ("llama", "{} lives in", "Léon Blum", "Paris", "<s> ▁Léon [▁Blum] ▁lives ▁in", "▁Paris"),
    (
        "llama",
        "{}'s headquarters are in",
        "O'Neal",
        "Rome",
        "<s> [▁O'Neal's] ▁headquarters ▁are ▁in",
        "▁Ro m e",
    ),
    ("llama", "In {}", "日", "English", "<s> ▁ I n ▁ <0xE6> <0x97> [<0xA5>]", "▁ E n g l is h"),
]


@pytest.mark.parametrize(
    ("kind", "prompt", "subject", "target", "pieces", "own"),
    SMALL,
    ids=lambda value: str(value)[:16],
)
def test_small_tokenizers_of_both_kinds_give_the_golden_pieces(
    kind: Any, prompt: str, subject: str, target: str, pieces: str, own: str
) -> None:
    tokenizer = tiny_tokenizer(kind)
    place = fill(prompt, subject)
    sequence = encode_with_target(tokenizer, place.text, target, separator=" ")
    position = subject_position(sequence, place)
    shown = tokenizer.convert_ids_to_tokens(list(sequence.ids))
    marked = [f"[{piece}]" if index == position else piece for index, piece in enumerate(shown)]
    assert " ".join(marked[: sequence.start]) == pieces
    assert " ".join(shown[sequence.start :]) == own
