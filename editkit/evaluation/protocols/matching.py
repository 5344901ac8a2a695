"""Free text compared with expected answers.

`normalise` is SQuAD's (Rajpurkar et al. 2016, arXiv 1606.05250): lower case, without punctuation,
articles and repeated blanks. It knows ASCII's punctuation and words between blanks. For an answer
in a script without blanks, all of Unicode's punctuation is dropped and each letter is a word.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable

from editkit.datasets.separators import writes_no_blanks


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous blanks."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def is_match(text: str, answers: Iterable[str]) -> bool:
    """The text is one of the answers after normalisation. An answer of which nothing is left (":")
    is compared as it is.
    """
    return any(
        words_of(text, like=answer) == wanted
        if (wanted := words_of(answer, like=answer))
        else text.strip() == answer.strip()
        for answer in answers
    )


def words_of(text: str, *, like: str) -> list[str]:
    """The words of a text after normalisation, as they are compared with the answer `like`."""
    words = normalise(text).split()
    if not any(map(writes_no_blanks, like)):
        return words
    letters = (
        letter if not writes_no_blanks(letter) else f" {letter} "
        for letter in " ".join(words)
        if not unicodedata.category(letter).startswith("P")
    )
    return "".join(letters).split()


def place_of(text: str, answer: str) -> int | None:
    """After how many words the text holds the answer, both normalised; None where it does not,
    "art" not being in "party".
    """
    words, wanted = words_of(text, like=answer), words_of(answer, like=answer)
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
