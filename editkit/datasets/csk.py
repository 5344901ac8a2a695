"""The commonsense sets PEP3k and 20Q (Gupta et al. 2023, arXiv 2305.14956): statements to be judged
True or False. Four layouts are told apart by their keys:

    probe        prompt, label, predicted_label, subject, verb, object; the lists affected_* (the
                 label holds; of reasoning True) and unaffected_*
    rewrite      requested_rewrite {prompt with the colon, subject, verb, object, target_new.str,
                 target_true.str}
    annotated    prompt, label (0 | 1), subject, verb, object
    plain        prompt, label; subject, verb and object come from annotated files with the same
                 statements

A statement is followed by a colon, as in the authors' code, and "True" or "False" is the target.
A statement without an annotation cannot be a request: the place of the edit would be unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from editkit.datasets.base import AbstractDataset, LoadedDataset, OnBadRecord, Order, load_records
from editkit.datasets.fields import Fields, shortened
from editkit.datasets.records import find_records, read_json
from editkit.types import EditRequest, Probe

_ADVICE = "The files: https://github.com/anshitag/memit_csk, folder data"

Annotations = Mapping[str, Mapping[str, object]]  # by statement
_LABELS = {0: "False", 1: "True"}
_OTHER = {"False": "True", "True": "False"}
# Differs from the paper's names only in being short: who the statement is said of, what it says of
# them, what it says it of.
_AFFECTED = {"affected_subject": "subject", "affected_verb": "verb", "affected_object": "object"}
_UNAFFECTED = {"unaffected_subject": "subject", "unaffected_object": "object"}


@dataclass(frozen=True, kw_only=True)
class CommonSense(AbstractDataset):
    """Statements with a wrong judgement to correct."""

    name: str
    set: Literal["20q", "pep3k"]
    edit_at: Literal[
        "subject", "verb", "object"
    ]  # which part of the statement takes the subject's place
    path: str | None
    file: str  # looked for below $EDITKIT_DATA when path is null
    id: str | None  # hub dataset, the last resort
    annotations: tuple[
        str, ...
    ]  # annotated files, where a plain file's subject, verb and object are looked up by statement
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
                given=shortened(target),
                allowed="True and False are allowed",
            )
        old = _OTHER.get(target)
        subject = self._part(fields, prefix, annotations)
        identity = fields.get("case_id") if fields.get("id") is None else fields.get("id")
        # What an unaffected statement's judgement should be is not in the file; it is compared with
        # the unedited model's alone.
        locality = {
            kind: _probes(fields, f"unaffected_neighborhood_{part}", str(old))
            for kind, part in _UNAFFECTED.items()
        }
        portability = {
            kind: _probes(fields, f"affected_neighborhood_{part}", target)
            for kind, part in _AFFECTED.items()
        }
        portability["reasoning"] = _probes(fields, "affected_reasoning", "True")
        return EditRequest(
            id=f"{self.name}/{self.set}/{index if identity is None else identity}",
            prompt=_asked(fields.template_of(f"{prefix}prompt", subject)),
            subject=subject,
            target=target,
            target_old=old,
            paraphrases=tuple(
                _asked(statement) for statement in fields.optional_texts("affected_paraphrase")
            ),
            locality={kind: probes for kind, probes in locality.items() if probes},
            portability={kind: probes for kind, probes in portability.items() if probes},
        )

    def _part(self, fields: Fields, prefix: str, annotations: Annotations) -> str:
        """The part of the statement that takes the subject's place, from the record or else from
        the annotated files.
        """
        key = f"{prefix}{self.edit_at}"
        found = fields.get(key)
        if found is None:
            found = annotations.get(str(fields.get("prompt")), {}).get(self.edit_at)
        if found is None:
            fields.note(
                key,
                "is missing",
                given="no annotation",
                allowed="annotated files are svo_annotated/*: dataset.annotations=[FILE,...]",
            )
            return ""
        return fields.checked(key, found)


def read_annotations(paths: Sequence[str]) -> tuple[Annotations, list[str]]:
    """The annotations by statement, and the beginnings of the files' digests."""
    files = [read_json(Path(path).expanduser(), key="dataset.annotations") for path in paths]
    found = {
        str(record.get("prompt")): record
        for file in files
        for record in file.records
        if isinstance(record, Mapping)
    }
    return found, [file.digest[:12] for file in files]


def _asked(statement: str) -> str:
    return statement if statement.endswith(":") else f"{statement}:"


def _label(fields: Fields, key: str) -> str:
    """True or False: written out in the probe files, a number in the annotated ones."""
    value = fields.get(key)
    found = (
        value.strip()
        if isinstance(value, str)
        else _LABELS.get(value)
        if type(value) is int
        else None
    )
    if found not in _OTHER:
        fields.note(
            key,
            "is no judgement",
            given=shortened(value),
            allowed="True, False, 1 and 0 are allowed",
        )
        return ""
    return found


def _probes(fields: Fields, key: str, answer: str) -> tuple[Probe, ...]:
    return tuple(
        Probe(prompt=_asked(statement), answer=answer) for statement in fields.optional_texts(key)
    )
