"""The commonsense sets PEP3k and 20Q (Gupta et al. 2023, arXiv 2305.14956): statements that are
judged True or False. Four layouts are recognised by their keys:

    probe        prompt, label, predicted_label, subject, verb, object; the lists affected_* (the
                 label holds; of reasoning True) and unaffected_*
    rewrite      requested_rewrite {prompt with the colon, subject, verb, object, target_new.str,
                 target_true.str}
    annotated    prompt, label (0 | 1), subject, verb, object
    plain        prompt, label; subject, verb and object come from annotated files with the same
                 statements

As in the authors' code, a colon follows the statement, and the target is "True" or "False". A
statement without an annotation cannot be a request, because the position of the edit is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from editkit.datasets.base import (
    AbstractFullPrompts,
    LoadedDataset,
    OnBadRecord,
    Order,
    load_records,
)
from editkit.datasets.fields import Fields, shortened
from editkit.datasets.records import find_records, read_json
from editkit.types import EditRequest, Probe

_ADVICE = "The files: https://github.com/anshitag/memit_csk, folder data"

Annotations = Mapping[str, Mapping[str, object]]  # by statement
_LABELS = {0: "False", 1: "True"}
_OTHER = {"False": "True", "True": "False"}
# Kinds of portability and locality -> the part of the statement that varies.
_AFFECTED = {"affected_subject": "subject", "affected_verb": "verb", "affected_object": "object"}
_UNAFFECTED = {"unaffected_subject": "subject", "unaffected_object": "object"}


@dataclass(frozen=True, kw_only=True)
class CommonSense(AbstractFullPrompts):
    """Statements whose wrong judgement is to be corrected."""

    name: str
    set: Literal["20q", "pep3k"]
    # the part of the statement that serves as the subject of the edit
    edit_at: Literal["subject", "verb", "object"]
    path: str | None
    file: str  # file in $EDITKIT_DATA, used if path is null
    id: str | None  # hub dataset, used if there is no file
    # annotated files with the subject, verb and object of a plain file's statements
    annotations: tuple[str, ...]
    order: Order
    limit: int | None
    on_bad_record: OnBadRecord

    def load(self, seed: int) -> LoadedDataset:
        annotations, digests = read_annotations(self.annotations)
        return load_records(
            find_records(path=self.path, files=[self.file], hub_id=self.id, advice=_ADVICE),
            lambda fields, index: [self._parse(fields, index, annotations)],
            name=self.name,
            order=self.order,
            seed=seed,
            limit=self.limit,
            on_bad_record=self.on_bad_record,
            variant={"edit_at": self.edit_at}
            | ({"annotations": "+".join(digests)} if digests else {}),
        )

    def _parse(self, fields: Fields, index: int, annotations: Annotations) -> EditRequest:
        is_rewrite = fields.get("requested_rewrite") is not None
        prefix = "requested_rewrite." if is_rewrite else ""
        target = (
            fields.text("requested_rewrite.target_new.str")
            if is_rewrite
            else _label(fields, "label")
        )
        if is_rewrite and target and target not in _OTHER:
            fields.note(
                "requested_rewrite.target_new.str",
                "is no judgement",
                got=shortened(target),
                expected="True or False",
            )
        old = _OTHER.get(target)
        part = self._part(fields, prefix, annotations)
        identity = fields.get("case_id") if fields.get("id") is None else fields.get("id")
        # The file has no judgement of an unaffected statement. It is only compared with that of the
        # unedited model.
        locality = {
            kind: _probes(fields, f"unaffected_neighborhood_{part}", str(old))
            for kind, part in _UNAFFECTED.items()
        }
        portability = {
            kind: _probes(fields, f"affected_neighborhood_{part}", target)
            for kind, part in _AFFECTED.items()
        }
        portability["reasoning"] = _probes(fields, "affected_reasoning", "True")
        prompt, subject = self.located(fields, f"{prefix}prompt", part)
        return EditRequest(
            id=f"{self.name}/{self.set}/{index if identity is None else identity}",
            prompt=_with_colon(prompt),
            subject=subject,
            target=target,
            target_old=old,
            paraphrases=tuple(
                _with_colon(statement) for statement in fields.optional_texts("affected_paraphrase")
            ),
            locality={kind: probes for kind, probes in locality.items() if probes},
            portability={kind: probes for kind, probes in portability.items() if probes},
        )

    def _part(self, fields: Fields, prefix: str, annotations: Annotations) -> str:
        """The part of the statement that serves as the subject, from the record or from the
        annotated files.
        """
        key = f"{prefix}{self.edit_at}"
        part = fields.get(key)
        if part is None:
            part = annotations.get(str(fields.get("prompt")), {}).get(self.edit_at)
        if part is None and self.subject == "last_token":
            return ""
        if part is None:
            fields.note(
                key,
                "is missing",
                got="no annotation",
                fix="set dataset.annotations=[FILE,...] to the files svo_annotated/*",
            )
            return ""
        return fields.checked(key, part)


def read_annotations(paths: Sequence[str]) -> tuple[Annotations, list[str]]:
    """The annotations by statement, and the first digits of the files' digests."""
    files = [read_json(Path(path).expanduser(), key="dataset.annotations") for path in paths]
    annotations = {
        str(record.get("prompt")): record
        for file in files
        for record in file.records
        if isinstance(record, Mapping)
    }
    return annotations, [file.digest[:12] for file in files]


def _with_colon(statement: str) -> str:
    return statement if statement.endswith(":") else f"{statement}:"


def _label(fields: Fields, key: str) -> str:
    """True or False. Probe files have the word, annotated files a number."""
    value = fields.get(key)
    label = (
        value.strip()
        if isinstance(value, str)
        else _LABELS.get(value)
        if type(value) is int
        else None
    )
    if label not in _OTHER:
        fields.note(
            key,
            "is no judgement",
            got=shortened(value),
            expected="True, False, 1 or 0",
        )
        return ""
    return label


def _probes(fields: Fields, key: str, answer: str) -> tuple[Probe, ...]:
    return tuple(
        Probe(prompt=_with_colon(statement), answer=answer)
        for statement in fields.optional_texts(key)
    )
