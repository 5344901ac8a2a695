"""One record's fields, read and checked: what is wrong, what had to be left out and what is odd is
noted, and said in the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from editkit.datasets.records import Malformed

SHOWN = 80  # characters of a value in an error's text


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong with one field; records are counted by `field: reason`, so neither holds a
    value.
    """

    field: str
    reason: str
    given: str = ""
    allowed: str = ""

    def __str__(self) -> str:
        details = "; ".join(
            part for part in (self.given and f"{self.given} was given", self.allowed) if part
        )
        return f"{self.field}: {self.reason}" + (f" - {details}" if details else "")


@dataclass(frozen=True, slots=True)
class Findings:
    """What one record's reading brought up."""

    problems: list[Problem] = field(default_factory=list)  # the record cannot be used
    left_out: list[str] = field(default_factory=list)  # a part of it cannot
    remarks: list[str] = field(default_factory=list)  # it can, but people should know


class Fields:
    """Reads one record and notes all that is wrong with it, so that one pass reports everything.

    A field that cannot be read gives an empty value; `problems` says so in the end. A key with dots
    leads into nested records.
    """

    def __init__(self, record: object, *, path: str = "", findings: Findings | None = None) -> None:
        self._record = record
        self._path = path
        self.findings = findings or Findings()
        if isinstance(record, Malformed):
            self.note("record", "is not JSON", allowed=record.reason)
        elif not isinstance(record, Mapping):
            self.note(
                "" if path else "record",
                f"is not an object with fields but of type {type(record).__name__}",
                given=shortened(record),
            )

    @property
    def problems(self) -> list[Problem]:
        return self.findings.problems

    def note(self, key: str, reason: str, *, given: str = "", allowed: str = "") -> None:
        """Remembers a problem; only the first of each field counts."""
        name = ".".join(part for part in (self._path, key) if part)
        if name not in (known.field for known in self.problems):
            self.problems.append(Problem(field=name, reason=reason, given=given, allowed=allowed))

    def leave_out(self, what: str) -> None:
        """Counts a part of the record that is left out, the rest of the record being sound."""
        self.findings.left_out.append(what)

    def remark(self, what: str) -> None:
        """Counts something odd about the record."""
        self.findings.remarks.append(what)

    def get(self, key: str) -> object:
        """The raw value, None where there is none."""
        value: object = self._record
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def names(self, key: str = "") -> tuple[str, ...]:
        """The names in a nested record, or in the record itself; none where the value is missing or
        null.
        """
        value = self.get(key) if key else self._record
        if value is not None and not isinstance(value, Mapping):
            self.note(
                key,
                f"is not an object with fields but of type {type(value).__name__}",
                given=shortened(value),
            )
        return tuple(map(str, value)) if isinstance(value, Mapping) else ()

    def text(self, key: str) -> str:
        """A text that is there and not blank, without blanks at its ends."""
        return self.checked(key, self.get(key))

    def optional_text(self, key: str) -> str | None:
        """Such a text, or None where the field is missing or null."""
        return None if self.get(key) is None else self.text(key)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of such texts."""
        return tuple(
            self.checked(f"{key}[{index}]", value) for index, value in enumerate(self._list(key))
        )

    def optional_texts(self, key: str) -> tuple[str, ...]:
        """Such a list, empty where the field is missing or null."""
        return () if self.get(key) is None else self.texts(key)

    def parts(self, key: str) -> list[Fields]:
        """A list of nested records, each with its own reader; what they note is the record's."""
        return [
            Fields(value, path=self._full(f"{key}[{index}]"), findings=self.findings)
            for index, value in enumerate(self._list(key))
        ]

    def _full(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def _list(self, key: str) -> list[object]:
        values = self.get(key)
        if not isinstance(values, list):
            self._wrong_type(key, values, "list")
            return []
        return values

    def _wrong_type(self, key: str, value: object, wanted: str) -> None:
        if value is None:
            self.note(key, "is missing", allowed=f"a {wanted} is needed")
        else:
            self.note(
                key, f"is not a {wanted} but of type {type(value).__name__}", given=shortened(value)
            )

    def checked(self, key: str, value: object) -> str:
        """A value that should be a text, without blanks at its ends; `key` names it."""
        if not isinstance(value, str):
            self._wrong_type(key, value, "text")
            return ""
        try:
            value.encode()
        except UnicodeEncodeError:
            self.note(
                key, "is not valid Unicode (half of a surrogate pair)", given=ascii(value)[:SHOWN]
            )
        if not value.strip():
            self.note(
                key,
                "is empty",
                given=shortened(value),
                allowed="a text that is not blank is needed",
            )
        return value.strip()

    def template(self, key: str, subject: str) -> str:
        """A prompt that already holds one "{}" for the subject."""
        prompt = self.text(key)
        if prompt and prompt.count("{}") != 1:
            self.note(
                key, 'does not hold exactly one "{}" for the subject', given=shortened(prompt)
            )
        self._check_subject(subject)
        return prompt

    def template_of(self, key: str, subject: str) -> str:
        """A full prompt, with the subject's first occurrence as a word of its own replaced by "{}";
        other occurrences stay.

        Single braces are ordinary text. A literal "{}" could not be told from the slot and is a
        problem.
        """
        prompt = self.text(key)
        self._check_subject(subject)
        if not prompt or not subject:
            return ""
        if "{}" in prompt:
            self.note(key, 'holds "{}", which marks the subject', given=shortened(prompt))
        whole = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)
        # Scripts without blanks between words know no whole match, hence the second try.
        start = whole.start() if whole else prompt.find(subject)
        if start < 0:
            self.note(
                key,
                "does not hold the subject",
                given=shortened(prompt),
                allowed=f"the subject is {shortened(subject)}",
            )
            return ""
        return f"{prompt[:start]}{{}}{prompt[start + len(subject) :]}"

    def _check_subject(self, subject: str) -> None:
        if "{}" in subject:
            self.note(
                "subject",
                'holds "{}", which marks the subject in a prompt',
                given=shortened(subject),
            )


def shortened(value: object) -> str:
    """A value as a person would write it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
