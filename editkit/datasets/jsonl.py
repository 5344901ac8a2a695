"""Our own format: JSON lines, one edit request each, with the names of `EditRequest`.

prompt, subject and target are needed; prompt is either a template with one "{}" for the subject or
a full prompt that holds the subject. A probe is {prompt, answer, aliases}; aliases may be missing.
Names that the format does not know are an error: they are misspelt.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from editkit.datasets.base import AbstractDataset, LoadedDataset, OnBadRecord, Order, load_records
from editkit.datasets.fields import Fields, shortened
from editkit.datasets.records import read_json_lines
from editkit.types import EditRequest, Probe

_NAMES = tuple(field.name for field in dataclasses.fields(EditRequest))
_PROBE_NAMES = tuple(field.name for field in dataclasses.fields(Probe))


@dataclass(frozen=True, kw_only=True)
class JsonLines(AbstractDataset):
    """Edit requests that somebody wrote for editkit."""

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
            max_shown=None,  # whoever writes a file wants to mend all of it at once
        )

    def _parse(self, fields: Fields, index: int) -> list[EditRequest]:
        _check_names(fields, _NAMES)
        subject = fields.text("subject")
        target, old = fields.text("target"), fields.optional_text("target_old")
        if target and target == old:
            fields.note(
                "target", "is the same as target_old: nothing to edit", given=shortened(target)
            )
        has_slot = "{}" in str(fields.get("prompt"))
        return [
            EditRequest(
                id=f"{self.name}/{_identity(fields, index)}",
                prompt=fields.template("prompt", subject)
                if has_slot
                else fields.template_of("prompt", subject),
                subject=subject,
                target=target,
                target_old=old,
                paraphrases=fields.optional_texts("paraphrases"),
                neighbours=_probes(fields, "neighbours"),
                locality=_kinds(fields, "locality"),
                portability=_kinds(fields, "portability"),
                attribute_prompts=_probes(fields, "attribute_prompts"),
                generation_prompts=fields.optional_texts("generation_prompts"),
                references=fields.optional_texts("references"),
                group=fields.optional_text("group"),
                hops=_probes(fields, "hops"),
            )
        ]


def _check_names(fields: Fields, known: Sequence[str]) -> None:
    for name in fields.names():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            fields.note(
                name, "is not a field of this format", allowed=f"{hint}allowed: {', '.join(known)}"
            )


def _identity(fields: Fields, index: int) -> str:
    """The record's id, or its number, counted from 1."""
    value = fields.get("id")
    if value is None:
        return str(index + 1)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        fields.note("id", "is neither a text nor a whole number", given=shortened(value))
    return str(value).strip()


def _probes(fields: Fields, key: str) -> tuple[Probe, ...]:
    if fields.get(key) is None:
        return ()
    found = []
    for part in fields.parts(key):
        _check_names(part, _PROBE_NAMES)
        found.append(
            Probe(
                prompt=part.text("prompt"),
                answer=part.text("answer"),
                aliases=part.optional_texts("aliases"),
            )
        )
    return tuple(found)


def _kinds(fields: Fields, key: str) -> dict[str, tuple[Probe, ...]]:
    found = {}
    for kind in fields.names(key):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", kind):  # a metric is named after it
            fields.note(
                f"{key}.{kind}",
                "is no name of a kind",
                allowed="small letters, digits and _ are allowed",
            )
        else:
            found[kind] = _probes(fields, f"{key}.{kind}")
    return {kind: probes for kind, probes in found.items() if probes}
