"""Free text compared with expected answers.

`normalise` is SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250): lower case, without punctuation,
articles and repeated blanks.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def is_match(text: str, answers: Iterable[str]) -> bool:
    """The text is one of the answers after normalisation. An answer of which nothing is left (":")
    is compared as it is.
    """
    return any(
        normalise(text) == wanted
        if (wanted := normalise(answer))
        else text.strip() == answer.strip()
        for answer in answers
    )


def place_of(text: str, answer: str) -> int | None:
    """After how many words the text holds the answer, both normalised; None where it does not,
    "art" not being in "party".
    """
    words, wanted = normalise(text).split(), normalise(answer).split()
    if not wanted:
        return 0 if answer.strip() and answer.strip() in text else None
    return next(
        (
            place
            for place in range(len(words) - len(wanted) + 1)
            if words[place : place + len(wanted)] == wanted
        ),
        None,
    )


def contains(text: str, answers: Iterable[str]) -> bool:
    """The text holds one of the answers, as whole words after normalisation."""
    return any(place_of(text, answer) is not None for answer in answers)
