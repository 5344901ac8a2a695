"""From text to token ids and back to places in the text: blanks, BOS, padding and the subject's
last token are settled here alone.

Every text is tokenised once and whole, and places in it are found through the tokenizer's offsets.
Tokenising parts and adding up their lengths goes wrong where a BOS is counted twice, where a
metaspace belongs to the next word, and where a part's last token merges with what follows.

Shape letters: B rows, T tokens (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from editkit.errors import ConfigError
from editkit.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PLACE = "{}"
# any valid id will do, nothing reads a padded position; a tokenizer's own pad token may be missing
# or outside the embedding
PADDING_ID = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text's tokens, with the BOS if the tokenizer adds one, never with an EOS.

    `spans` holds the characters (start, end) that each token stands for; the leading `num_special`
    tokens stand for none.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    num_special: int

    def token_at(self, character: int) -> int:
        """Index of the token that holds a character; of several (the bytes of one letter) the last.
        Raises ValueError if none does.
        """
        for index in range(len(self.ids) - 1, self.num_special - 1, -1):
            start, end = self.spans[index]
            if start <= character < end:
                return index
        raise ValueError(
            f"no token holds character {character} of the text: the tokenizer drops it."
        )


@dataclass(frozen=True, slots=True)
class TargetSequence:
    """A prompt followed by its target, tokenised as one text; the tokens from `start` on are the
    target's, its leading blank included.
    """

    encoded: Encoded
    start: int

    @property
    def ids(self) -> tuple[int, ...]:
        return self.encoded.ids

    @property
    def target_ids(self) -> tuple[int, ...]:
        return self.encoded.ids[self.start :]

    @property
    def predicting(self) -> slice:
        """The positions whose logits predict the target's tokens, in order."""
        return slice(self.start - 1, len(self.encoded.ids) - 1)


@dataclass(frozen=True, slots=True)
class FilledPrompt:
    """A prompt with its subject in place; `subject_start` and `subject_end` are its first character
    and the one after its last.
    """

    text: str
    subject_start: int
    subject_end: int


def fill(prompt: str, subject: str, *, context: str = PLACE) -> FilledPrompt:
    """Puts the subject into the prompt and the prompt into the context, and says where the subject
    went.

    The place comes from the template, not from a search: a subject that occurs twice, or inside
    another word, is found all the same. Braces in the subject stay as they are. Raises ConfigError
    unless prompt and context hold exactly one "{}" each, and for a blank subject.
    """
    problems = [
        f"a {what} needs exactly one {PLACE} - given {text!r}."
        for what, text in (("prompt", prompt), ("context", context))
        if text.count(PLACE) != 1
    ]
    if not subject.strip():
        problems.append(f"the subject of the prompt {prompt!r} is blank.")
    if problems:
        raise ConfigError(problems)
    before_prompt, after_prompt = context.split(PLACE)
    before_subject, after_subject = prompt.split(PLACE)
    start = len(before_prompt) + len(before_subject) + len(subject) - len(subject.lstrip())
    text = before_prompt + before_subject + subject + after_subject + after_prompt
    return FilledPrompt(text, start, start + len(subject.strip()))


def require_offsets(tokenizer: Any) -> None:
    """Raises ConfigError for a tokenizer that cannot say which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            f"model.id: {type(tokenizer).__name__} is a slow tokenizer, which gives no offsets - "
            "a fast one (tokenizer.json) is needed to "
            "find a subject's tokens."
        )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Encoded]:
    """Tokenises whole texts, with the special tokens that the tokenizer puts in front. Nothing is
    truncated.
    """
    if not texts:
        return []
    batch = tokenizer(
        list(texts),
        add_special_tokens=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [
        _without_end(*row)
        for row in zip(
            batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"], strict=True
        )
    ]


def _without_end(
    ids: Sequence[int], spans: Sequence[tuple[int, int]], special: Sequence[int]
) -> Encoded:
    """Keeps the special tokens in front of the text, drops those that end it."""
    leading = next((index for index, flag in enumerate(special) if not flag), len(special))
    end = next(
        (index + 1 for index in range(len(special) - 1, -1, -1) if not special[index]), leading
    )
    return Encoded(tuple(ids[:end]), tuple(spans[:end]), leading)


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> list[tuple[int, ...]]:
    """The ids of each prompt. Blanks at a prompt's end are dropped: they belong to what follows."""
    return [
        encoded.ids for encoded in encode(tokenizer, [prompt.rstrip(" ") for prompt in prompts])
    ]


def encode_with_targets(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> list[TargetSequence]:
    """Tokenises (prompt, target) pairs with exactly one blank between the two.

    A token that holds the prompt's end and the blank counts as the prompt's. Raises ConfigError for
    a blank target, and where no token precedes the target (an empty prompt, a tokenizer without
    BOS).
    """
    cut = [(prompt.rstrip(" "), target.strip()) for prompt, target in pairs]
    if problems := [
        f"the target of the prompt {prompt!r} is blank." for prompt, target in cut if not target
    ]:
        raise ConfigError(problems)
    found = []
    for (prompt, target), encoded in zip(
        cut, encode(tokenizer, [f"{prompt} {target}" for prompt, target in cut]), strict=True
    ):
        blank = len(prompt)
        start = next(
            index
            for index, (first, after) in enumerate(encoded.spans)
            if index >= encoded.num_special and (first >= blank or after > blank + 1)
        )
        if start == 0:
            raise ConfigError(
                f"nothing precedes the target {target!r}: the prompt is empty and the tokenizer "
                "adds no BOS."
            )
        found.append(TargetSequence(encoded, start))
    return found


def encode_with_target(
    tokenizer: PreTrainedTokenizerFast, prompt: str, target: str
) -> TargetSequence:
    """`encode_with_targets` of one pair."""
    return encode_with_targets(tokenizer, [(prompt, target)])[0]


def target_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, target: str) -> tuple[int, ...]:
    """The tokens that the target has after this prompt: one blank in front, no BOS."""
    return encode_with_target(tokenizer, prompt, target).target_ids


def subject_position(encoded: Encoded | TargetSequence, filled: FilledPrompt) -> int:
    """Index of the token that holds the subject's last character, in the unpadded sequence.

    `encoded` is the filled text, alone or followed by a target. Raises ConfigError where the
    tokenizer drops that character.
    """
    tokens = encoded.encoded if isinstance(encoded, TargetSequence) else encoded
    try:
        return tokens.token_at(filled.subject_end - 1)
    except ValueError:
        raise ConfigError(
            f"the tokenizer drops the last character of the subject in {filled.text!r}."
        ) from None


@dataclass(frozen=True, slots=True, eq=False)
class PromptBatch:
    """Sequences side by side. Padding changes no result: padded positions are masked, and positions
    count from each row's first token.
    """

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    first_B: torch.Tensor  # the column of each row's first token

    def columns(self, positions: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """(B,): the columns of one position a row, counted in the unpadded sequences."""
        return self.first_B + torch.as_tensor(positions, device=self.first_B.device)

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        """What a network is called with."""
        return {
            "input_ids": self.ids_BT,
            "attention_mask": self.mask_BT,
            "position_ids": self.position_ids_BT,
        }


def pad(
    sequences: Sequence[Sequence[int]],
    *,
    device: torch.device | str = "cpu",
    side: Literal["left", "right"] = "right",
) -> PromptBatch:
    """Puts sequences of ids (none of them empty) into one batch."""
    width = max(len(ids) for ids in sequences)
    padding = [width - len(ids) for ids in sequences]
    first = padding if side == "left" else [0] * len(padding)
    ids_BT = torch.full((len(sequences), width), PADDING_ID, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, (ids, start) in enumerate(zip(sequences, first, strict=True)):
        ids_BT[row, start : start + len(ids)] = torch.tensor(ids)
        mask_BT[row, start : start + len(ids)] = 1
    position_ids_BT = (mask_BT.cumsum(-1) - 1).clamp(
        min=0
    )  # GPT-2 alone does not derive them from the mask
    return PromptBatch(
        ids_BT.to(device),
        mask_BT.to(device),
        position_ids_BT.to(device),
        torch.tensor(first, device=device),
    )
