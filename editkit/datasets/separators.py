"""What stands between a prompt and its target. Only this file decides it, and only
`editkit.model.tokens` joins the two.

A separator has two parts. Its last blanks belong to the target's first token, as in most
tokenizers; they are the gap. All before them, such as a newline, belongs to the prompt, which they
make the lead: the model neither learns to say it nor has to.
"""

from __future__ import annotations

import bisect
import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from editkit.errors import message
from editkit.types import EditRequest, Probe

AUTO = "auto"
WORDS = {"newline": "\n"}  # choices that are hard to type on a command line
BLANK = " "
EXPECTED = f"{AUTO}, {', '.join(WORDS)}, or a text without letters and digits, such as ' ' or ''"
# The kinds of choices, for the provenance.
WITH_BLANK = "a blank"
NO_BLANKS = "nothing: the prompt ends in a script without blanks"
OPENING = "nothing: the prompt ends in an opening quote or bracket"
LINE_END = "nothing: the prompt ends in a line break or a tab"
# First and last code points of scripts that write no blanks between words, and of the punctuation
# of Chinese and Japanese. Korean, Ethiopic and Vietnamese write blanks.
WITHOUT_BLANKS = (
    (0x0E00, 0x0E7F),  # Thai
    (0x0E80, 0x0EFF),  # Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x19E0, 0x19FF),  # symbols of Khmer
    (0x1A20, 0x1AAF),  # Lanna
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # radicals
    (0x3001, 0x3007),  # comma, full stop, iteration marks; brackets are also Korean
    (0x3021, 0x312F),  # numerals, Hiragana, Katakana, Bopomofo
    (0x31A0, 0x31FF),  # more Bopomofo, strokes, Katakana
    (0x3400, 0x4DBF),  # Han, extension A
    (0x4E00, 0x9FFF),  # Han
    (0xA000, 0xA4CF),  # Yi
    (0xA980, 0xA9DF),  # Javanese
    (0xA9E0, 0xA9FF),  # more Burmese
    (0xAA60, 0xAADF),  # more Burmese, Tai Viet
    (0xF900, 0xFAFF),  # Han for compatibility
    (0xFF01, 0xFF9F),  # full-width letters and punctuation, half-width Katakana
    (0x1AFF0, 0x1B2FF),  # more kana, Nushu
    (0x20000, 0x3347F),  # Han, further extensions
)
_FIRSTS = [first for first, _ in WITHOUT_BLANKS]
_QUOTES = "\"'`"


def between(prompt: str, separator: str | None = None) -> tuple[str, str]:
    """The lead, which is the prompt with the separator's part before its last blanks, and the gap,
    which is these blanks.

    Args:
        separator: None or `auto`: by what the prompt ends in. With an empty one, blanks at the end
            of the prompt stay.
    """
    bare = prompt.rstrip(BLANK)
    if separator is None or separator == AUTO:
        return bare, BLANK if _automatic(prompt) == WITH_BLANK else ""
    chosen = separator or prompt[len(bare) :]
    head = chosen.rstrip(BLANK)
    return bare + head, chosen[len(head) :]


def lead_of(probe: Probe) -> str:
    """The text that the model continues with the answer."""
    return between(probe.prompt, probe.separator)[0]


def joined(probe: Probe) -> str:
    """Prompt and answer as one text."""
    return "".join((*between(probe.prompt, probe.separator), probe.answer))


def separator_of(probe: Probe) -> str:
    """What stands between prompt and answer; a blank of the prompt's own counts."""
    lead, gap = between(probe.prompt, probe.separator)
    return lead[len(probe.prompt.rstrip(BLANK)) :] + gap


def kind_of(probe: Probe) -> str:
    """What stands between prompt and answer, and why."""
    return _kind_of(probe.prompt, probe.separator)


def _kind_of(prompt: str, separator: str | None) -> str:
    if separator is None or separator == AUTO:
        return _automatic(prompt)
    return f"{separator!r}, as chosen"


def _automatic(prompt: str) -> str:
    """The kind of the choice for a prompt: one blank, where its script has blanks and nothing else
    stands at its end.
    """
    last = prompt[-1:]
    if (last.isascii() and last.isalpha()) or last in ("", BLANK):  # a blank of its own is this one
        return WITH_BLANK
    if last.isspace():
        return LINE_END
    if _opens(prompt):
        return OPENING
    letters = [letter for letter in prompt if letter.isalpha() or writes_no_blanks(letter)]
    if not letters or not writes_no_blanks(letters[-1]):
        return WITH_BLANK
    # "What is 日本語?" is English, "日本の首都は:" is Japanese.
    is_typed_in_ascii = last.isascii() and not last.isalnum()
    most = 2 * sum(map(writes_no_blanks, letters)) > len(letters)
    return WITH_BLANK if is_typed_in_ascii and not most else NO_BLANKS


def writes_no_blanks(letter: str) -> bool:
    """Whether the letter, or punctuation, is of a script without blanks between words."""
    place = bisect.bisect_right(_FIRSTS, ord(letter)) - 1
    return place >= 0 and ord(letter) <= WITHOUT_BLANKS[place][1]


def _opens(prompt: str) -> bool:
    """Whether the prompt ends in an opening bracket or quote. A quote may open or close; it closes
    what stands right before it.
    """
    kind = unicodedata.category(prompt[-1])
    if kind == "Ps":
        return True
    if kind not in ("Pi", "Pf") and prompt[-1] not in _QUOTES:
        return False
    before = prompt[-2:-1]
    return (
        not before
        or before.isspace()
        or before in ":="
        or unicodedata.category(before) in ("Ps", "Pi", "Pd")
    )


def problem_of(choice: str) -> str | None:
    """Why a choice is none, in the grammar of messages for `separator`; None for a valid one."""
    if choice in (AUTO, *WORDS) or not any(letter.isalnum() for letter in choice):
        return None
    return message("separator", "invalid value", got=choice, expected=EXPECTED)


def separated(request: EditRequest, choice: str) -> EditRequest:
    """The request with its separator, or this one where it has none, on all its prompts."""
    own = choice if request.separator is None else request.separator
    separator = None if own == AUTO else WORDS.get(own, own)
    if separator is None and request.separator is None:
        return request

    def put(probes: Iterable[Probe]) -> tuple[Probe, ...]:
        return tuple(replace(probe, separator=separator) for probe in probes)

    return replace(
        request,
        separator=separator,
        neighbours=put(request.neighbours),
        locality={kind: put(probes) for kind, probes in request.locality.items()},
        portability={kind: put(probes) for kind, probes in request.portability.items()},
        attribute_prompts=put(request.attribute_prompts),
        hops=put(request.hops),
    )


def kinds_of(requests: Iterable[EditRequest]) -> dict[str, int]:
    """What stands between prompts and answers -> the number of prompts, of all kinds."""
    return dict(
        Counter(_kind_of(*parts) for request in requests for parts in _with_separators(request))
    )


def _with_separators(request: EditRequest) -> Iterator[tuple[str, str | None]]:
    """All prompts, each with its separator."""
    yield request.full_prompt, request.separator
    for prompt in request.paraphrases:
        yield prompt, request.separator
    for probe in itertools.chain(
        request.neighbours,
        *request.locality.values(),
        *request.portability.values(),
        request.attribute_prompts,
        request.hops,
    ):
        yield probe.prompt, probe.separator
