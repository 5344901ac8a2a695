"""The checked fields of one dataset record. Problems, omitted parts and remarks are collected while
it is read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from editkit.datasets.records import Malformed
from editkit.errors import message

SHOWN = 80  # characters of a value in a message
Occurrence = Literal["first", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A problem of one field. Records are counted by `field: reason`, so neither contains a
    value.
    """

    field: str
    reason: str
    detail: str = ""  # continues the reason
    got: str = ""  # as it is shown, see `shortened`
    expected: str = ""
    fix: str = ""

    def at(self, place: str) -> str:
        """The message about the field of a record at that place."""
        got = {"got": _Shown(self.got)} if self.got else {}
        return message(
            f"{place}: {self.field}",
            f"{self.reason}: {self.detail}" if self.detail else self.reason,
            **got,
            expected=self.expected or None,
            fix=self.fix or None,
        )


class _Shown(str):
    """A text that messages show as it is, without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True, slots=True)
class Findings:
    """The findings in one record."""

    problems: list[Problem] = field(default_factory=list)  # make the record unusable
    left_out: list[str] = field(default_factory=list)  # unusable parts of a usable record
    remarks: list[str] = field(default_factory=list)  # oddities of a usable record


class Fields:
    """Reads one record and collects all its problems, so that one pass reports everything.

    A field that cannot be read gives an empty value and a problem. A key with dots refers to a
    field of a nested record.
    """

    def __init__(self, record: object, *, path: str = "", findings: Findings | None = None) -> None:
        self._record = record
        self._path = path
        self.findings = findings or Findings()
        if isinstance(record, Malformed):
            self.note("record", record.problem, detail=record.reason)
        elif not isinstance(record, Mapping):
            self.note(
                "" if path else "record",
                f"is not an object with fields but of type {type(record).__name__}",
                got=shortened(record),
            )

    @property
    def problems(self) -> list[Problem]:
        """The problems collected so far."""
        return self.findings.problems

    def note(
        self,
        key: str,
        reason: str,
        *,
        detail: str = "",
        got: str = "",
        expected: str = "",
        fix: str = "",
    ) -> None:
        """Adds a problem, unless the field already has one. See `Problem` for the arguments."""
        name = ".".join(part for part in (self._path, key) if part)
        if name not in (known.field for known in self.problems):
            self.problems.append(
                Problem(
                    field=name, reason=reason, detail=detail, got=got, expected=expected, fix=fix
                )
            )

    def leave_out(self, what: str) -> None:
        """Counts an unusable part of a usable record."""
        self.findings.left_out.append(what)

    def remark(self, what: str) -> None:
        """Counts an oddity of the record."""
        self.findings.remarks.append(what)

    def get(self, key: str) -> object:
        """The raw value; None if the field is missing."""
        value: object = self._record
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def names(self, key: str = "") -> tuple[str, ...]:
        """The field names of a nested record, or of the record itself; none if the value is missing
        or null.
        """
        value = self.get(key) if key else self._record
        if value is not None and not isinstance(value, Mapping):
            self.note(
                key,
                f"is not an object with fields but of type {type(value).__name__}",
                got=shortened(value),
            )
        return tuple(map(str, value)) if isinstance(value, Mapping) else ()

    def text(self, key: str, *, keeps_end: bool = False) -> str:
        """A required text that is not blank, without leading and trailing blanks and line breaks;
        with `keeps_end`, without leading ones.
        """
        return self.checked(key, self.get(key), keeps_end=keeps_end)

    def optional_text(self, key: str) -> str | None:
        """Such a text, or None if the field is missing or null."""
        return None if self.get(key) is None else self.text(key)

    def filled(self, key: str) -> str | None:
        """Such a text, or None if the field is missing, null, NaN or blank: what files that were
        written from tables have in empty cells.
        """
        value = self.get(key)
        is_empty = (
            value is None
            or (isinstance(value, float) and math.isnan(value))
            or (isinstance(value, str) and not value.strip())
        )
        return None if is_empty else self.text(key)

    def texts(self, key: str, *, keeps_end: bool = False) -> tuple[str, ...]:
        """A list of such texts."""
        return tuple(
            self.checked(f"{key}[{index}]", value, keeps_end=keeps_end)
            for index, value in enumerate(self._list(key))
        )

    def optional_texts(self, key: str, *, keeps_end: bool = False) -> tuple[str, ...]:
        """Such a list, empty if the field is missing or null."""
        return () if self.get(key) is None else self.texts(key, keeps_end=keeps_end)

    def parts(self, key: str) -> list[Fields]:
        """The readers of a list of nested records, which share this record's findings."""
        return [
            Fields(value, path=self._full(f"{key}[{index}]"), findings=self.findings)
            for index, value in enumerate(self._list(key))
        ]

    def part(self, key: str) -> Fields:
        """The reader of one nested record, as in `parts`."""
        return Fields(self.get(key), path=self._full(key), findings=self.findings)

    def lists(self, key: str) -> list[list[object]]:
        """A list of lists."""
        values = self._list(key)
        for index, value in enumerate(values):
            if not isinstance(value, list):
                self._wrong_type(f"{key}[{index}]", value, "list")
        return [value for value in values if isinstance(value, list)]

    def _full(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _list(self, key: str) -> list[object]:
        values = self.get(key)
        if not isinstance(values, list):
            self._wrong_type(key, values, "list")
            return []
        return values

    def _wrong_type(self, key: str, value: object, expected: str) -> None:
        if value is None:
            self.note(key, "is missing", expected=f"a {expected}")
        else:
            self.note(
                key, f"is not a {expected} but of type {type(value).__name__}", got=shortened(value)
            )

    def checked(self, key: str, value: object, *, keeps_end: bool = False) -> str:
        """A value that must be a text, as `text` returns it; `key` names it."""
        if not isinstance(value, str):
            self._wrong_type(key, value, "text")
            return ""
        try:
            value.encode()
        except UnicodeEncodeError:
            self.note(
                key, "is not valid Unicode (half of a surrogate pair)", got=ascii(value)[:SHOWN]
            )
        if "\0" in value:
            self.note(key, "holds a NUL character", got=shortened(value))
        if not value.strip():
            self.note(
                key,
                "is empty",
                got=shortened(value),
                expected="a text that is not blank",
            )
        return value.lstrip() if keeps_end else value.strip()

    def template(self, key: str, subject: str, *, keeps_end: bool = False) -> str:
        """A prompt that contains one "{}" for the subject."""
        prompt = self.text(key, keeps_end=keeps_end)
        if prompt and prompt.count("{}") != 1:
            self.note(key, 'does not hold exactly one "{}" for the subject', got=shortened(prompt))
        self._check_subject(subject)
        return prompt

    def template_of(
        self,
        key: str,
        subject: str,
        *,
        occurrence: Occurrence = "first",
        may_lack: bool = False,
        keeps_end: bool = False,
    ) -> str:
        """A full prompt whose first or last occurrence of the subject as a whole word is replaced
        by "{}".

        Other occurrences stay. Single braces are plain text. A literal "{}" is a problem, because
        it looks like the slot.

        Args:
            may_lack: a prompt that does not hold the subject is returned as it is; otherwise it is
                a problem.
        """
        prompt = self.text(key, keeps_end=keeps_end)
        self._check_subject(subject)
        if not prompt or not (subject or may_lack):
            return ""
        if "{}" in prompt:
            self.note(key, 'holds "{}", which marks the subject', got=shortened(prompt))
        start = _place(prompt, subject, occurrence) if subject else -1
        if start < 0 and may_lack:
            return prompt
        if start < 0:
            self.note(
                key,
                "does not hold the subject",
                got=shortened(prompt),
                expected=f"a prompt with the subject {shortened(subject)}",
            )
            return ""
        return f"{prompt[:start]}{{}}{prompt[start + len(subject) :]}"

    def _check_subject(self, subject: str) -> None:
        if "{}" in subject:
            self.note(
                "subject",
                'holds "{}", which marks the subject in a prompt',
                got=shortened(subject),
            )


def _place(prompt: str, subject: str, occurrence: Occurrence) -> int:
    """Where the subject begins in the prompt: as a whole word, else anywhere, which is right in
    scripts without blanks between words. -1 if the prompt does not hold it.
    """
    which = 0 if occurrence == "first" else -1
    whole = [found.start() for found in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)]
    if whole:
        return whole[which]
    return prompt.find(subject) if occurrence == "first" else prompt.rfind(subject)


def shortened(value: object) -> str:
    """The representation of a value, cut after `SHOWN` characters."""
    try:
        text = repr(value)
    except RecursionError:  # lists in lists
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
