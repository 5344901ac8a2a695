"""The context templates of ROME and MEMIT: short sampled texts, put before a prompt so that a key
does not depend on how a text begins.

Meng et al. 2022 (arXiv 2202.05262), section 3.1, step 1. Differs from the authors' code: seeded;
taken on the unedited model once a run; special tokens are never sampled, since their text would be
tokenised as text afterwards; braces are removed, since a template is filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from editkit.errors import ConfigError
from editkit.model.generate import decode, generate
from editkit.model.tokens import PLACE

if TYPE_CHECKING:
    from editkit.lazy import torch
    from editkit.model.editable import EditableModel

TOP_K = 5  # as published


def sample_contexts(
    model: EditableModel, *, lengths: Sequence[tuple[int, int]], generator: torch.Generator
) -> tuple[str, ...]:
    """The bare "{}", then for every (tokens, count) of `lengths` so many templates "TEXT. {}".

    As published, `tokens` counts the start token (BOS, or EOS where there is none), so (10, 5)
    gives five texts of nine tokens. Raises ConfigError for tokens < 2, count < 0, and a tokenizer
    with neither BOS nor EOS.
    """
    tokenizer = model.tokenizer
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    problems = [
        f"editor contexts: ({tokens}, {count}) - tokens must be at least 2, counts not negative."
        for tokens, count in lengths
        if tokens < 2 or count < 0
    ]
    if start is None:
        problems.append(
            f"model.id: the tokenizer of {model.name} has neither BOS nor EOS, so nothing can "
            "start a context."
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
    """One line without braces, broken characters (a text may end inside one) and repeated
    blanks.
    """
    for unwanted in "{}\ufffd":
        text = text.replace(unwanted, "")
    return " ".join(text.split())
