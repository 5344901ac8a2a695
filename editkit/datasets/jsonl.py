"""editkit's own format: JSON lines with one edit request per line, with the field names of
`EditRequest`.

prompt, subject and target are required. prompt is a template with one "{}" for the subject, or a
full prompt that contains the subject; `occurrence` says which one, first or last, if it stands
there several times. A probe is {prompt, answer, aliases}, where aliases is optional. `separator`
stands between all prompts of the request and their answers. Unknown names are an error, because
they are usually misspelt.

Prompts keep the blanks and line breaks that they end in.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from editkit.datasets.base import (
    AbstractFullPrompts,
    LoadedDataset,
    OnBadRecord,
    Order,
    load_records,
)
from editkit.datasets.fields import Fields, Occurrence, shortened
from editkit.datasets.records import read_json_lines
from editkit.datasets.separators import EXPECTED, problem_of
from editkit.types import EditRequest, Probe

_NAMES = (*(field.name for field in dataclasses.fields(EditRequest)), "occurrence")
_PROBE_NAMES = ("prompt", "answer", "aliases")
_OCCURRENCES: dict[object, Occurrence | None] = {None: None, "first": "first", "last": "last"}


@dataclass(frozen=True, kw_only=True)
class JsonLines(AbstractFullPrompts):
    """Edit requests in editkit's own format."""

    name: str
    path: str
    order: Order
    limit: int | None
    on_bad_record: OnBadRecord

    def load(self, seed: int) -> LoadedDataset:
        return load_records(
            read_json_lines(Path(self.path).expanduser(), key="dataset.path"),
            self._parse,
            name=self.name,
            order=self.order,
            seed=seed,
            limit=self.limit,
            on_bad_record=self.on_bad_record,
            max_shown=None,  # the author of a file can correct all problems at once
        )

    def _parse(self, fields: Fields, index: int) -> list[EditRequest]:
        _check_names(fields, _NAMES)
        has_slot = "{}" in str(fields.get("prompt"))
        subject = fields.text("subject") if has_slot else self.subject_of(fields, "subject")
        target, old = fields.text("target"), fields.optional_text("target_old")
        if target and target == old:
            fields.note(
                "target", "is the same as target_old: nothing to edit", got=shortened(target)
            )
        occurrence = _occurrence(fields)
        if has_slot:
            prompt = fields.template("prompt", subject, keeps_end=True)
        else:
            prompt, subject = self.located(
                fields, "prompt", subject, occurrence=occurrence, keeps_end=True
            )
        return [
            EditRequest(
                id=f"{self.name}/{_identity(fields, index)}",
                prompt=prompt,
                subject=subject,
                target=target,
                target_old=old,
                paraphrases=fields.optional_texts("paraphrases", keeps_end=True),
                neighbours=_probes(fields, "neighbours"),
                locality=_kinds(fields, "locality"),
                portability=_kinds(fields, "portability"),
                attribute_prompts=_probes(fields, "attribute_prompts"),
                generation_prompts=fields.optional_texts("generation_prompts"),
                references=fields.optional_texts("references"),
                group=fields.optional_text("group"),
                hops=_probes(fields, "hops"),
                separator=_separator(fields),
            )
        ]


def _check_names(fields: Fields, known: Sequence[str]) -> None:
    for name in fields.names():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            fields.note(
                name,
                "is not a field of this format",
                expected=f"one of {', '.join(known)}",
                fix=f"did you mean {close[0]}?" if close else "",
            )


def _identity(fields: Fields, index: int) -> str:
    """The record's id, or its number counted from 1."""
    value = fields.get("id")
    if value is None:
        return str(index + 1)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        fields.note("id", "is neither a text nor a whole number", got=shortened(value))
    return str(value).strip()


def _occurrence(fields: Fields) -> Occurrence | None:
    """The record's own choice; None without one."""
    value = fields.get("occurrence")
    if not (value is None or isinstance(value, str)) or value not in _OCCURRENCES:
        expected = "first or last"
        fields.note("occurrence", "is no choice", got=shortened(value), expected=expected)
        return None
    return _OCCURRENCES[value]


def _separator(fields: Fields) -> str | None:
    """The record's own separator; None without one. It may be blank or empty."""
    value = fields.get("separator")
    if value is None:
        return None
    if not isinstance(value, str) or problem_of(value):
        fields.note("separator", "is no separator", got=shortened(value), expected=EXPECTED)
        return None
    return value


def _probes(fields: Fields, key: str) -> tuple[Probe, ...]:
    if fields.get(key) is None:
        return ()
    probes = []
    for part in fields.parts(key):
        _check_names(part, _PROBE_NAMES)
        probes.append(
            Probe(
                prompt=part.text("prompt", keeps_end=True),
                answer=part.text("answer"),
                aliases=part.optional_texts("aliases"),
            )
        )
    return tuple(probes)


def _kinds(fields: Fields, key: str) -> dict[str, tuple[Probe, ...]]:
    probes_by_kind = {}
    for kind in fields.names(key):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", kind):  # it becomes a part of a metric's name
            fields.note(
                f"{key}.{kind}",
                "is no name of a kind",
                expected="lower-case letters, digits and _",
            )
        else:
            probes_by_kind[kind] = _probes(fields, f"{key}.{kind}")
    return {kind: probes for kind, probes in probes_by_kind.items() if probes}
