"""The tokens of a request as text, for people: where the prompt ends and the target begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

from editkit.model.tokens import encode_with_targets, fill, parts_of, subject_position
from editkit.types import EditRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from editkit.model.chat import ChatTemplate


def split_of(
    tokenizer: PreTrainedTokenizerFast, request: EditRequest, *, chat: ChatTemplate | None = None
) -> str:
    """`<s> 'Its' ' name' [' Ada'] ' is' -> ' Bob'`: the edited token is in brackets. `'京' x3` are
    three tokens for one letter.
    """
    place = fill(request.prompt, request.subject)
    probe = request.probe(prompt=place.text)
    (sequence,) = encode_with_targets(tokenizer, [probe], chat=chat)
    edited = subject_position(sequence, place)
    before = chat.before if chat else ""
    text = "".join((before, *parts_of(probe, chat), probe.answer.strip()))
    encoded = sequence.encoded
    special = tokenizer.convert_ids_to_tokens(list(encoded.ids[: encoded.num_special]))
    pieces: list[tuple[str, list[int]]] = []
    shown = 0
    for index in range(encoded.num_special, len(encoded.ids)):
        end = len(before) + encoded.spans[index][1]
        if end > shown or not pieces:
            pieces.append((repr(text[shown:end]), [index]))
            shown = end
        else:  # more bytes of a letter that is shown
            pieces[-1][1].append(index)
    words = []
    for piece, tokens in pieces:
        word = f"{piece} x{len(tokens)}" if len(tokens) > 1 else piece
        words += ["->"] if sequence.start in tokens else []
        words.append(f"[{word}]" if edited in tokens else word)
    return " ".join((*special, *words))
