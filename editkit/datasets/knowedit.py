"""KnowEdit (Zhang et al. 2024, arXiv 2401.01286): WikiData recent and counterfact, ZsRE, WikiBio.
The layouts are recognised by their keys:

    facts      subject, prompt, target_new; ground_truth and rephrase_prompt in some; locality
               {Relation_Specificity, Forgetfulness} and portability {Subject_Aliasing, Reasoning,
               Logical_Generalization}: lists of {prompt, ground_truth}
    WikiBio    concept, text (the beginning of a biography), labels (its next sentence), locality

A ground truth is a text, a list of texts (the names of one answer) or a list of such lists (several
answers). The first name of the first answer is the answer. All other names are its aliases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from editkit.datasets.base import (
    AbstractFullPrompts,
    LoadedDataset,
    OnBadRecord,
    Order,
    load_records,
)
from editkit.datasets.fields import Fields, shortened
from editkit.datasets.records import find_records
from editkit.types import EditRequest, Probe

_ADVICE = "The files: https://huggingface.co/datasets/zjunlp/KnowEdit, folder benchmark"

_LOCALITY = {"Relation_Specificity": "relation_specificity", "Forgetfulness": "forgetfulness"}
_PORTABILITY = {
    "Subject_Aliasing": "alias",
    "Reasoning": "reasoning",
    "Logical_Generalization": "logical_generalization",
}


@dataclass(frozen=True, kw_only=True)
class KnowEdit(AbstractFullPrompts):
    """Facts of Wikidata or sentences of biographies, with portability and locality questions."""

    name: str
    path: str | None
    files: tuple[str, ...]  # the first of them that exists in $EDITKIT_DATA is used if path is null
    id: str | None  # hub dataset, used if there is no file
    hub_file: str | None  # the JSON file in its repository
    order: Order
    limit: int | None
    on_bad_record: OnBadRecord

    def load(self, seed: int) -> LoadedDataset:
        return load_records(
            find_records(
                path=self.path,
                files=self.files,
                hub_id=self.id,
                hub_file=self.hub_file,
                advice=_ADVICE,
            ),
            self._parse,
            name=self.name,
            order=self.order,
            seed=seed,
            limit=self.limit,
            on_bad_record=self.on_bad_record,
        )

    def _parse(self, fields: Fields, index: int) -> list[EditRequest]:
        is_biography = fields.get("concept") is not None
        lacks_subject = fields.get("subject") is None and self.subject == "required"
        if not is_biography and lacks_subject:
            fields.note("record", "has neither subject (facts) nor concept (WikiBio)")
        subject = self.subject_of(fields, "concept" if is_biography else "subject")
        target = fields.text("labels" if is_biography else "target_new")
        paraphrase = fields.optional_text("rephrase_prompt")
        prompt, subject = self.located(fields, "text" if is_biography else "prompt", subject)
        return [
            EditRequest(
                id=f"{self.name}/{index}",
                prompt=prompt,
                subject=subject,
                target=target,
                target_old=_target_old(fields, target),
                paraphrases=() if paraphrase is None else (paraphrase,),
                locality=_kinds(fields, "locality", _LOCALITY, target),
                portability=_kinds(fields, "portability", _PORTABILITY, target),
            )
        ]


def _target_old(fields: Fields, target: str) -> str | None:
    """The first true answer other than the target.

    A few targets are true answers. Such a record must not be compared with its own target.
    """
    if fields.get("ground_truth") is None:
        return None
    answers = [name for names in _answers(fields, "ground_truth") for name in names]
    if target in answers:
        fields.remark("the target is one of the true answers")
    return next((answer for answer in answers if answer != target), None)


def _kinds(
    fields: Fields, key: str, names: Mapping[str, str], target: str
) -> dict[str, tuple[Probe, ...]]:
    """The probes by kind, without empty kinds."""
    probes_by_kind: dict[str, tuple[Probe, ...]] = {}
    for kind in fields.names(key):
        if kind not in names:
            fields.note(f"{key}.{kind}", "is no known kind", expected=f"one of {', '.join(names)}")
            continue
        read = (_probe(part, names[kind], target) for part in fields.parts(f"{key}.{kind}"))
        probes = tuple(probe for probe in read if probe is not None)
        if probes:
            probes_by_kind[names[kind]] = probes
    return probes_by_kind


def _probe(part: Fields, kind: str, target: str) -> Probe | None:
    """One question; None, with a count in `left_out`, if the file has no usable answer for it."""
    answers = _answers(part, "ground_truth")
    if kind == "forgetfulness":
        # In "The ethnic group of X, which is not <target>, is" the target contradicts the question.
        # EasyEdit scores such an answer. In wiki_recent's training file, 297 of 298 answers contain
        # the target, and 151 contain nothing else.
        others = [names for names in answers if target not in names]
        if answers and not others:
            part.leave_out(
                "forgetfulness: the only answer is the target, which the question excludes"
            )
            return None
        answers = others
    if not answers:
        part.leave_out(f"{kind}: no answer")
        return None
    (answer, *aliases) = dict.fromkeys(name for names in answers for name in names)
    return Probe(prompt=part.text("prompt"), answer=answer, aliases=tuple(aliases))


def _answers(fields: Fields, key: str) -> list[list[str]]:
    """The names of each answer, without blank names and without answers that have no name."""
    value = fields.get(key)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        fields.note(key, "is neither a text nor a list", got=shortened(value))
        return []
    answers = value if all(isinstance(names, list) for names in value) else [value]
    for name in (name for names in answers for name in names):
        if not isinstance(name, str):
            fields.note(
                key,
                f"holds a value of type {type(name).__name__}, not a text",
                got=shortened(name),
            )
            return []
    stripped = [[name.strip() for name in names if name.strip()] for names in answers]
    return [names for names in stripped if names]
