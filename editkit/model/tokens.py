"""Token ids of texts and positions in them. Only this file handles blanks, BOS, padding and the
subject's last token.

Every text is tokenised once and as a whole, and the tokenizer's offsets give the positions.
Tokenising parts and adding their lengths fails if a BOS is counted twice, if a metaspace belongs to
the next word, or if a part's last token merges with the following text.

Shape letters: B rows, T tokens (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from editkit.errors import ConfigError, message
from editkit.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from editkit.model.chat import ChatTemplate

PLACE = "{}"
# Any valid id is right, because no padded position is read. The tokenizer's own pad token may be
# missing or outside the embedding.
PADDING_ID = 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text's tokens, with the BOS if the tokenizer adds one, and without an EOS.

    `spans` holds the characters (start, end) of each token, counted from the prompt's first one:
    they are negative before a prompt in a chat template. The leading `num_special` tokens have no
    characters.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    num_special: int

    def token_at(self, character: int) -> int:
        """The index of the token that contains a character. If there are several, for the bytes of
        one letter, the last one. Raises ValueError if there is none.
        """
        for index in range(len(self.ids) - 1, self.num_special - 1, -1):
            start, end = self.spans[index]
            if start <= character < end:
                return index
        raise ValueError(f"no token contains character {character}: the tokenizer drops it")


@dataclass(frozen=True, slots=True)
class TargetSequence:
    """A prompt and its target, tokenised as one text. The target's tokens begin at `start` and
    include its leading blank.
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
    """A prompt with its subject filled in. `subject_start` and `subject_end` are the indices of the
    subject's first character and of the character after its last.
    """

    text: str
    subject_start: int
    subject_end: int


def fill(prompt: str, subject: str, *, context: str = PLACE) -> FilledPrompt:
    """Fills the subject into the prompt and the prompt into the context, and locates the subject.

    The position comes from the template, not from a search, so the subject may occur twice or
    inside another word. Braces in the subject stay unchanged.

    Raises:
        ConfigError: the prompt or the context does not contain exactly one "{}", or the subject is
            blank.
    """
    problems = [
        message(key, "the template is malformed", got=text, expected=f"exactly one {PLACE}")
        for key, text in (("prompt", prompt), ("context", context))
        if text.count(PLACE) != 1
    ]
    if not subject.strip():
        problems.append(message("subject", f"the subject of the prompt {prompt!r} is blank"))
    if problems:
        raise ConfigError(problems)
    before_prompt, after_prompt = context.split(PLACE)
    before_subject, after_subject = prompt.split(PLACE)
    start = len(before_prompt) + len(before_subject) + len(subject) - len(subject.lstrip())
    text = before_prompt + before_subject + subject + after_subject + after_prompt
    return FilledPrompt(text, start, start + len(subject.strip()))


def require_offsets(tokenizer: Any) -> None:
    """Raises ConfigError for a tokenizer without offsets from tokens to characters."""
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            message(
                "model.id",
                "a slow tokenizer gives no offsets, which locate a subject's tokens",
                got=type(tokenizer).__name__,
                expected="a fast tokenizer (tokenizer.json)",
            )
        )


def encode(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    chat: ChatTemplate | None = None,
) -> list[Encoded]:
    """Tokenises whole texts with the tokenizer's leading special tokens and without truncation.

    Args:
        chat: puts each text into the user's turn, up to where the assistant's begins. Special
            tokens are those that the template writes.
    """
    return _encode(tokenizer, [text + (chat.after if chat else "") for text in texts], chat)


def _encode(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], chat: ChatTemplate | None
) -> list[Encoded]:
    """Tokenises texts, with `chat` after the beginning of a dialogue."""
    if not texts:
        return []
    before = chat.before if chat else ""
    batch = tokenizer(
        [before + text for text in texts],
        add_special_tokens=chat is None,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    if chat:
        first = len(before)
        return [
            Encoded(tuple(ids), tuple((start - first, end - first) for start, end in spans), 0)
            for ids, spans in zip(batch["input_ids"], batch["offset_mapping"], strict=True)
        ]
    return [
        _without_end(*row)
        for row in zip(
            batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"], strict=True
        )
    ]


def _without_end(
    ids: Sequence[int], spans: Sequence[tuple[int, int]], special: Sequence[int]
) -> Encoded:
    """The encoded text with its leading special tokens and without its trailing ones."""
    leading = next((index for index, flag in enumerate(special) if not flag), len(special))
    end = next(
        (index + 1 for index in range(len(special) - 1, -1, -1) if not special[index]), leading
    )
    return Encoded(tuple(ids[:end]), tuple(spans[:end]), leading)


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    chat: ChatTemplate | None = None,
) -> list[tuple[int, ...]]:
    """The ids of each prompt. Trailing blanks are dropped, because they belong to the next
    token.
    """
    cut = [prompt.rstrip(" ") for prompt in prompts]
    return [encoded.ids for encoded in encode(tokenizer, cut, chat=chat)]


def encode_with_targets(
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[str, str]],
    *,
    chat: ChatTemplate | None = None,
) -> list[TargetSequence]:
    """Tokenises (prompt, target) pairs with exactly one blank between prompt and target.

    A token that contains both the end of the prompt and the blank belongs to the prompt.

    Args:
        chat: the prompt is the user's turn, and the target the beginning of the assistant's. The
            template, not a blank, stands between them.

    Raises:
        ConfigError: a target is blank, or no token precedes it (an empty prompt with a tokenizer
            without BOS).
    """
    cut = [(prompt.rstrip(" "), target.strip()) for prompt, target in pairs]
    if problems := [
        message("target", f"the target of the prompt {prompt!r} is blank")
        for prompt, target in cut
        if not target
    ]:
        raise ConfigError(problems)
    sequences = []
    between, gap = (chat.after, chat.gap) if chat else ("", " ")
    texts = [f"{prompt}{between}{gap}{target}" for prompt, target in cut]
    for (prompt, target), encoded in zip(cut, _encode(tokenizer, texts, chat), strict=True):
        blank = len(prompt) + len(between)
        start = next(
            index
            for index, (first, after) in enumerate(encoded.spans)
            if index >= encoded.num_special and (first >= blank or after > blank + len(gap))
        )
        if start == 0:
            raise ConfigError(
                message(
                    "prompt",
                    "no token precedes the target, because the prompt is empty and the tokenizer "
                    f"adds no BOS (target {target!r})",
                )
            )
        sequences.append(TargetSequence(encoded, start))
    return sequences


def encode_with_target(
    tokenizer: PreTrainedTokenizerFast, prompt: str, target: str
) -> TargetSequence:
    """`encode_with_targets` for one pair."""
    return encode_with_targets(tokenizer, [(prompt, target)])[0]


def target_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, target: str) -> tuple[int, ...]:
    """The target's tokens after this prompt, with one leading blank and without a BOS."""
    return encode_with_target(tokenizer, prompt, target).target_ids


def subject_position(encoded: Encoded | TargetSequence, filled: FilledPrompt) -> int:
    """The index of the token with the subject's last character, in the unpadded sequence.

    `encoded` is the filled text, alone or followed by a target. Raises ConfigError if the tokenizer
    drops that character.
    """
    tokens = encoded.encoded if isinstance(encoded, TargetSequence) else encoded
    try:
        return tokens.token_at(filled.subject_end - 1)
    except ValueError:
        raise ConfigError(
            message(
                "subject", f"the tokenizer drops its last character in the text {filled.text!r}"
            )
        ) from None


@dataclass(frozen=True, slots=True, eq=False)
class PromptBatch:
    """A batch of padded sequences. Padding changes no result, because padded positions are masked
    and position ids count from each row's first token.
    """

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    first_B: torch.Tensor  # the column of each row's first token

    def columns(self, positions: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """(B,): the column of one position per row, given in the unpadded sequences."""
        return self.first_B + torch.as_tensor(positions, device=self.first_B.device)

    @property
    def arguments(self) -> dict[str, torch.Tensor]:
        """The keyword arguments of the network."""
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
    """Sequences of ids, none of them empty, as one batch."""
    width = max(len(ids) for ids in sequences)
    padding = [width - len(ids) for ids in sequences]
    first = padding if side == "left" else [0] * len(padding)
    ids_BT = torch.full((len(sequences), width), PADDING_ID, dtype=torch.long)
    mask_BT = torch.zeros_like(ids_BT)
    for row, (ids, start) in enumerate(zip(sequences, first, strict=True)):
        ids_BT[row, start : start + len(ids)] = torch.tensor(ids)
        mask_BT[row, start : start + len(ids)] = 1
    # Needed by GPT-2, which does not derive them from the mask.
    position_ids_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    return PromptBatch(
        ids_BT.to(device),
        mask_BT.to(device),
        position_ids_BT.to(device),
        torch.tensor(first, device=device),
    )
