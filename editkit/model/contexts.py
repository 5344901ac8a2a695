"""The context templates of ROME and MEMIT: short sampled texts before a prompt, over which keys are
averaged so that they depend less on the beginning of a text.

Source: Meng et al. 2022 (arXiv 2202.05262), section 3.1, step 1. Differences from the authors'
code: the samples are seeded; the unedited model generates them once per run; special tokens are
never sampled, because their text would later be tokenised as plain text; braces are removed,
because a template is filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editkit.errors import ConfigError, message
from editkit.model.generate import decode, generate
from editkit.model.tokens import PLACE

if TYPE_CHECKING:
    from editkit.lazy import torch
    from editkit.model.editable import EditableModel

TOP_K = 5  # as published


def sample_contexts(
    model: EditableModel, *, lengths: Sequence[tuple[int, int]], generator: torch.Generator
) -> tuple[str, ...]:
    """The bare "{}", then `count` templates "TEXT. {}" for every (tokens, count) of `lengths`.

    As in the published code, `tokens` includes the start token (BOS, or EOS without a BOS), so
    (10, 5) gives five texts of nine tokens.

    Raises:
        ConfigError: tokens < 2, count < 0, or a tokenizer with neither BOS nor EOS.
    """
    tokenizer = model.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    problems = [
        message(
            "editor.context_lengths",
            "a pair (tokens, count) is out of range",
            got=(tokens, count),
            expected="at least 2 tokens and a count that is not negative",
        )
        for tokens, count in lengths
        if tokens < 2 or count < 0
    ]
    if start is None:
        problems.append(
            message(
                "model.id",
                f"the tokenizer of {model.name} has neither BOS nor EOS to start a context with",
                fix="choose a tokenizer with one of them in model.tokenizer",
            )
        )
    if problems:
        raise ConfigError(problems)
    contexts = [PLACE]
    for tokens, count in lengths:
        rows = generate(
            model,
            [(start,)] * count,
            max_new_tokens=tokens - 1,
            generator=generator,
            top_k=TOP_K,
            banned=tokenizer.all_special_ids,
            ends=(),
        )
        contexts += [f"{clean(text)}. {PLACE}" for text in decode(model, rows)]
    return tuple(contexts)


def clean(text: str) -> str:
    """The text as one line without braces, incomplete characters and repeated blanks.

    A sampled text may end inside a character.
    """
    for unwanted in "{}\ufffd":
        text = text.replace(unwanted, "")
    return " ".join(text.split())
