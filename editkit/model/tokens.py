"""Token ids of texts and positions in them. Only this file joins prompts and targets, and handles
BOS, padding and the subject's last token.

Every text is tokenised once and as a whole, and the tokenizer's offsets give the positions.
Tokenising parts and adding their lengths fails if a BOS is counted twice, if a metaspace belongs to
the next word, or if a part's last token merges with the following text.

Shape letters: B rows, T tokens (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from editkit.datasets.separators import between
from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.types import Probe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from editkit.model.chat import ChatTemplate

PLACE = "{}"
# Any valid id is right, because no padded position is read. The tokenizer's own pad token may be
# missing or outside the embedding.
PADDING_ID = 0
# Stands before a text that is tokenised without its prompt. A text's beginning is another word than
# the same text after other letters, and no tokenizer makes a token of a newline and letters.
MARK = "\n"


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

    def followed_by(self, tail: Sequence[tuple[int, tuple[int, int]]]) -> Encoded:
        """The text with further tokens, each given as (id, span)."""
        ids, spans = zip(*tail, strict=True)
        return Encoded((*self.ids, *ids), (*self.spans, *spans), self.num_special)


@dataclass(frozen=True, slots=True)
class TargetSequence:
    """A prompt and its target, tokenised as one text. The target's tokens begin at `start` and
    include the blank before it.
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
    inside another word. Braces in the subject stay unchanged. Without a subject, and without a
    place for one, the prompt's last character is its subject.

    Raises:
        ConfigError: the prompt or the context does not contain exactly one "{}", or the subject is
            blank.
    """
    if not subject and prompt.strip() and PLACE not in prompt and context.count(PLACE) == 1:
        before, after = context.split(PLACE)
        end = len(before) + len(prompt.rstrip(" "))
        return FilledPrompt(before + prompt + after, end - 1, end)
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
    """The ids of each text that is continued (`lead_of` of a probe). Trailing blanks are dropped,
    because they belong to the next token.
    """
    cut = [prompt.rstrip(" ") for prompt in prompts]
    return [encoded.ids for encoded in encode(tokenizer, cut, chat=chat)]


def encode_with_targets(
    tokenizer: PreTrainedTokenizerFast,
    probes: Sequence[Probe],
    *,
    chat: ChatTemplate | None = None,
) -> list[TargetSequence]:
    """Tokenises prompts with their answers, and between them what
    `editkit.datasets.separators.between` chooses: a blank in most scripts.

    A token that contains both the end of the prompt and the blank belongs to the prompt. Where
    nothing stands between, the prompt has the tokens that it has alone: what is trained and scored
    is what a generation begins with.

    Args:
        chat: the prompt is the user's turn, and the answer the beginning of the assistant's. The
            template, not a separator, stands between them.

    Raises:
        ConfigError: an answer is blank, or no token precedes it (an empty prompt with a tokenizer
            without BOS).
    """
    targets = [probe.answer.strip() for probe in probes]
    if problems := [
        message("target", f"the target of the prompt {probe.prompt!r} is blank")
        for probe, target in zip(probes, targets, strict=True)
        if not target
    ]:
        raise ConfigError(problems)
    parts = [parts_of(probe, chat) for probe in probes]
    texts = [f"{lead}{gap}{target}" for (lead, gap), target in zip(parts, targets, strict=True)]
    encoded = _encode(tokenizer, texts, chat)
    if chat is None:
        unseparated = [index for index, (_, gap) in enumerate(parts) if not gap]
        leads = _encode(tokenizer, [parts[index][0] for index in unseparated], None)
        for index, lead in zip(unseparated, leads, strict=True):
            if encoded[index].ids[: len(lead.ids)] != lead.ids:
                tail = _continued(tokenizer, targets[index], first=len(parts[index][0]))
                encoded[index] = encoded[index] if tail is None else lead.followed_by(tail)
    sequences = []
    for (lead_text, gap), target, sequence in zip(parts, targets, encoded, strict=True):
        blank = len(lead_text)
        start = next(
            index
            for index, (first, after) in enumerate(sequence.spans)
            if index >= sequence.num_special and (first >= blank or after > blank + len(gap))
        )
        if start == 0:
            raise ConfigError(
                message(
                    "prompt",
                    "no token precedes the target, because the prompt is empty and the tokenizer "
                    f"adds no BOS (target {target!r})",
                )
            )
        sequences.append(TargetSequence(sequence, start))
    return sequences


def parts_of(probe: Probe, chat: ChatTemplate | None) -> tuple[str, str]:
    """What stands before an answer: the text that is continued, and the gap."""
    if chat is not None:
        return probe.prompt.rstrip(" ") + chat.after, chat.gap
    return between(probe.prompt, probe.separator)


def _continued(
    tokenizer: PreTrainedTokenizerFast, text: str, *, first: int
) -> list[tuple[int, tuple[int, int]]] | None:
    """The tokens of a text that goes on right after other letters, as (id, span), with the text's
    first character at `first`. None if the tokenizer makes a token of the mark and the text.
    """
    batch = tokenizer(
        MARK + text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    pairs = zip(batch["input_ids"], batch["offset_mapping"], strict=True)
    inside = [(id, span) for id, span in pairs if span[1] > len(MARK)]
    if not inside or inside[0][1][0] < len(MARK):
        return None
    shift = first - len(MARK)
    return [(id, (start + shift, end + shift)) for id, (start, end) in inside]


def encode_with_target(
    tokenizer: PreTrainedTokenizerFast, prompt: str, target: str, *, separator: str | None = None
) -> TargetSequence:
    """`encode_with_targets` for one pair."""
    probe = Probe(prompt=prompt, answer=target, separator=separator)
    return encode_with_targets(tokenizer, [probe])[0]


def target_ids(tokenizer: PreTrainedTokenizerFast, prompt: str, target: str) -> tuple[int, ...]:
    """The target's tokens after this prompt, with the blank before it and without a BOS."""
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


def subject_positions(sequence: TargetSequence, filled: FilledPrompt) -> tuple[int, ...]:
    """The indices of the subject's tokens, in the unpadded sequence. Raises ConfigError as
    `subject_position`.
    """
    last = subject_position(sequence, filled)
    first = next(
        index
        for index in range(sequence.encoded.num_special, last + 1)
        if sequence.encoded.spans[index][1] > filled.subject_start
    )
    return tuple(range(first, last + 1))


@dataclass(frozen=True, slots=True, eq=False)
class PromptBatch:
    """A batch of padded sequences. Padding changes no result, because padded positions are masked
    and position ids count from each row's first token.
    """

    ids_BT: torch.Tensor
    mask_BT: torch.Tensor
    position_ids_BT: torch.Tensor
    first_B: torch.Tensor  # the column of each row's first token
    # (B, T): the column of the last token of each token's prompt, -1 for padding; None: not stated.
    # Sides beside the weights route each prompt by that token (`editkit.model.beside`).
    ends_BT: torch.Tensor | None = field(default=None, kw_only=True)

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
    prompts: Sequence[int] | None = None,
) -> PromptBatch:
    """Sequences of ids, none of them empty, as one batch.

    Args:
        prompts: the number of tokens of each row that are its prompt.
    """
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
    ends_BT = None
    if prompts is not None:
        last_B1 = torch.tensor(
            [start + size - 1 for start, size in zip(first, prompts, strict=True)]
        )[:, None]
        ends_BT = torch.where(mask_BT > 0, last_B1, -1).to(device)
    return PromptBatch(
        ids_BT.to(device),
        mask_BT.to(device),
        position_ids_BT.to(device),
        torch.tensor(first, device=device),
        ends_BT=ends_BT,
    )
