"""Greedy continuations of prompts, up to an end token, a newline or a cap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from editkit.evaluation.scoring.teacher_forcing import is_out_of_memory
from editkit.model.generate import decode, generate
from editkit.model.tokens import encode_prompts

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


def continue_greedily(
    model: EditableModel,
    prompts: Iterable[str],
    *,
    max_new_tokens: int,
    tokens_per_batch: int,
    until: Sequence[str] = ("\n",),
) -> dict[str, str]:
    """The continuation of each different prompt, up to the first of `until`, without surrounding
    blanks.

    A prompt that leaves no position for an answer loses its beginning. `tokens_per_batch` counts
    the positions of a batch, generated ones included. It is halved for the rest of the call if
    memory runs out.
    """
    texts = list(dict.fromkeys(prompts))
    room = max(1, model.max_length - max_new_tokens)
    rows = [ids[-room:] for ids in encode_prompts(model.tokenizer, texts, chat=model.chat)]
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    continuations: dict[int, tuple[int, ...]] = {}
    done = 0
    while done < len(order):
        longest = len(rows[order[done]]) + max_new_tokens
        size = max(1, tokens_per_batch // longest)
        chosen = order[done : done + size]
        try:
            new = generate(
                model,
                [rows[index] for index in chosen],
                max_new_tokens=max_new_tokens,
                until=until,
                batch_size=size,
            )
        except RuntimeError as error:
            if len(chosen) == 1 or not is_out_of_memory(error):
                raise
            tokens_per_batch //= 2
            continue
        continuations |= zip(chosen, new, strict=True)
        done += len(chosen)
    generations = decode(model, [continuations[index] for index in range(len(rows))])
    return {
        text: _cut(generation, until).strip()
        for text, generation in zip(texts, generations, strict=True)
    }


def _cut(text: str, until: Sequence[str]) -> str:
    for end in until:
        text = text.partition(end)[0]
    return text
