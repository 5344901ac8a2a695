"""JSON from files that people write or publish. What Python's reader takes in silence, or refuses
with an error of its own, is one problem with its line and field: a key that stands twice in an
object, a number of thousands of digits, nesting without end, a text that is not UTF-8.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

DEEPEST = 100  # lists and objects inside one another
MOST_DIGITS = 1000  # of a whole number
SHOWN_PARTS = 6  # of the path to a field
TOKEN = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|([{}\[\],:])|([^\s{}\[\],:"]+)', re.DOTALL)
BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(eq=False)
class BadJson(ValueError):
    """Why a text cannot be read, and where: the line and column from 1, and the field."""

    problem: str
    line: int
    column: int
    field: str  # "[3].prompt"; empty at the top

    @property
    def told(self) -> str:
        """The problem with its field."""
        return f"{self.problem}, field {self.field}" if self.field else self.problem

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}: {self.told}"


class _Refused(Exception):
    """Something that the second look names and places."""


def parse(content: bytes) -> Any:
    """The value of a file's bytes. A byte order mark of UTF-8 is skipped.

    Raises:
        BadJson: the first problem.
    """
    return parse_text(decode(content))


def decode(content: bytes) -> str:
    """The text of a file's bytes. Raises BadJson unless they are UTF-8 without NUL bytes."""
    if is_utf_16(content):
        raise BadJson("the text is UTF-16, not UTF-8", 1, 1, "")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8-sig", errors="replace")
        _refuse(before, len(before), f"byte {error.start} is not UTF-8")
    if "\0" in text:
        where = text.index("\0")
        _refuse(text, where, "NUL bytes, as UTF-16 and damaged files have them")
    return text


def is_utf_16(content: bytes) -> bool:
    """With a byte order mark, or without one where the first letter is of ASCII."""
    return content.startswith(BYTE_ORDER_MARKS) or b"\0" in content[:2]


def parse_text(text: str) -> Any:
    """The value of a text. Raises BadJson with the first problem."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_number)
    except json.JSONDecodeError as error:
        _refuse(text, error.pos, f"malformed JSON: {error.msg}")
    except (_Refused, RecursionError):
        walk = _walk(text, None)
        assert walk.problem is not None, "only a known problem is looked for"
        _refuse(text, walk.position, walk.problem, walk.path)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _Refused
    return value


def _number(digits: str) -> int:
    if _is_long(digits.lstrip("-")):
        raise _Refused
    return int(digits)


def _is_long(digits: str) -> bool:
    return len(digits) > MOST_DIGITS and digits.isdecimal()


def _refuse(text: str, position: int, problem: str, path: str | None = None) -> NoReturn:
    """Raises the problem at a position of the text."""
    start = text.rfind("\n", 0, position) + 1
    line = text.count("\n", 0, position) + 1
    if path is None:
        path = _walk(text, position).path if text.lstrip().startswith(("{", "[")) else ""
    raise BadJson(problem, line, position - start + 1, path)


@dataclass
class _Open:
    """An object or a list that is not closed yet."""

    is_object: bool
    place: int | str | None  # the index, or the key; None before an object's key
    keys: set[str] = field(default_factory=set)


@dataclass
class _Walk:
    opened: list[_Open] = field(default_factory=list)
    position: int = 0
    problem: str | None = None

    @property
    def path(self) -> str:
        """The field: `[3].prompt`."""
        parts = [
            f".{each.place}" if each.is_object else f"[{each.place}]"
            for each in self.opened
            if each.place is not None
        ]
        shown = parts[:SHOWN_PARTS] + (["..."] if len(parts) > SHOWN_PARTS else [])
        return "".join(shown).removeprefix(".")


def _walk(text: str, until: int | None) -> _Walk:
    """Goes through the tokens of a text up to a position, or up to the first problem if that is
    None. Neither depth nor length is limited, and no value is made.
    """
    walk = _Walk()
    for token in TOKEN.finditer(text):
        if until is not None and token.start() >= until:
            break
        walk.position = token.start()
        string, mark, other = token.groups()
        top = walk.opened[-1] if walk.opened else None
        if mark in ("{", "["):
            if until is None and len(walk.opened) == DEEPEST:
                walk.problem = f"more than {DEEPEST} lists and objects inside one another"
                break
            walk.opened.append(_Open(mark == "{", None if mark == "{" else 0))
        elif mark in ("}", "]") and top is not None:
            walk.opened.pop()
        elif mark == "," and top is not None:
            top.place = None if top.is_object else int(top.place or 0) + 1
        elif string is not None and top is not None and top.is_object and top.place is None:
            top.place = _key(string)
            if until is None and top.place in top.keys:
                walk.problem = "the key stands twice in one object"
                break
            top.keys.add(top.place)
        elif until is None and other is not None and _is_long(digits := other.lstrip("-")):
            walk.problem = f"a number of {len(digits)} digits"
            break
    return walk


def _key(string: str) -> str:
    try:
        return str(json.loads(string, strict=False))
    except ValueError:
        return string
