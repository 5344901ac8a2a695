"""CounterFact (Meng et al. 2022, arXiv 2202.05262) in its original layout and in EasyEdit's flat
one. The layouts are recognised by their keys:

    original   requested_rewrite {prompt with "{}", subject, target_new.str, target_true.str},
               paraphrase_prompts, neighborhood_prompts, attribute_prompts (subjects for which the
               new target is true), generation_prompts
    flat       prompt, subject, target_new, ground_truth, rephrase_prompt, locality_prompt,
               locality_ground_truth

The reference texts for consistency are in a separate file, `attribute_snippets.json`: a list of
{relation_id, target_id, samples: [{text}]}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from editkit.datasets.base import (
    AbstractFullPrompts,
    LoadedDataset,
    OnBadRecord,
    Order,
    load_records,
)
from editkit.datasets.fields import Fields
from editkit.datasets.records import find_records, read_json
from editkit.errors import ConfigError
from editkit.types import EditRequest, Probe

_ADVICE = "The original file: https://rome.baulab.info/data/dsets/counterfact.json"

# (relation, target), given by their Wikidata ids -> texts
Snippets = Mapping[tuple[str, str], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class CounterFact(AbstractFullPrompts):
    """Counterfactual completions with paraphrases, and with neighbours that have the same true
    target.
    """

    name: str
    path: str | None
    file: str  # file in $EDITKIT_DATA, used if path is null
    id: str | None  # hub dataset, used if there is no file
    snippets: str | None  # reference texts for the consistency of generated texts
    order: Order
    limit: int | None
    on_bad_record: OnBadRecord

    def load(self, seed: int) -> LoadedDataset:
        snippets, digest = read_snippets(self.snippets) if self.snippets is not None else ({}, None)
        return load_records(
            find_records(path=self.path, files=[self.file], hub_id=self.id, advice=_ADVICE),
            lambda fields, index: [self._parse(fields, index, snippets)],
            name=self.name,
            order=self.order,
            seed=seed,
            limit=self.limit,
            on_bad_record=self.on_bad_record,
            variant={} if digest is None else {"snippets": digest[:12]},
        )

    def _parse(self, fields: Fields, index: int, snippets: Snippets) -> EditRequest:
        case_id = fields.get("case_id")
        request_id = f"{self.name}/{index if case_id is None else case_id}"
        if fields.get("requested_rewrite") is not None:
            return _parse_original(fields, request_id, snippets)
        if fields.get("prompt") is None:
            fields.note(
                "record", "has neither requested_rewrite (original layout) nor prompt (flat layout)"
            )
        return self._parse_flat(fields, request_id)

    def _parse_flat(self, fields: Fields, request_id: str) -> EditRequest:
        subject = self.subject_of(fields, "subject")
        has_locality = fields.get("locality_prompt") is not None
        paraphrase = fields.optional_text("rephrase_prompt")
        prompt, subject = self.located(fields, "prompt", subject)
        return _distinct_targets(
            fields,
            EditRequest(
                id=request_id,
                prompt=prompt,
                subject=subject,
                target=fields.text("target_new"),
                target_old=fields.text("ground_truth"),
                paraphrases=() if paraphrase is None else (paraphrase,),
                neighbours=(
                    Probe(
                        prompt=fields.text("locality_prompt"),
                        answer=fields.text("locality_ground_truth"),
                    ),
                )
                if has_locality
                else (),
            ),
            key="target_new",
        )


def _parse_original(fields: Fields, request_id: str, snippets: Snippets) -> EditRequest:
    subject = fields.text("requested_rewrite.subject")
    true, target = (
        fields.text("requested_rewrite.target_true.str"),
        fields.text("requested_rewrite.target_new.str"),
    )
    relation = (
        fields.get("requested_rewrite.relation_id"),
        fields.get("requested_rewrite.target_new.id"),
    )
    return _distinct_targets(
        fields,
        EditRequest(
            id=request_id,
            prompt=fields.template("requested_rewrite.prompt", subject),
            subject=subject,
            target=target,
            target_old=true,
            paraphrases=fields.texts("paraphrase_prompts"),
            # For neighbours the old target is true; for the subjects of attribute prompts the new
            # one is.
            neighbours=tuple(
                Probe(prompt=prompt, answer=true) for prompt in fields.texts("neighborhood_prompts")
            ),
            attribute_prompts=tuple(
                Probe(prompt=prompt, answer=target)
                for prompt in fields.optional_texts("attribute_prompts")
            ),
            generation_prompts=fields.optional_texts("generation_prompts"),
            references=snippets.get((str(relation[0]), str(relation[1])), ()),
        ),
        key="requested_rewrite.target_new.str",
    )


def _distinct_targets(fields: Fields, request: EditRequest, *, key: str) -> EditRequest:
    if request.target == request.target_old:
        fields.note(
            key, "is the same as the true target: nothing to edit", got=repr(request.target)
        )
    return request


def read_snippets(path: str) -> tuple[Snippets, str]:
    """The reference texts by relation and target, and the file's digest. Raises ConfigError with
    all problems of the file.
    """
    records = read_json(Path(path).expanduser(), key="dataset.snippets")
    snippets: dict[tuple[str, str], tuple[str, ...]] = {}
    problems: list[str] = []
    for index, record in enumerate(records.records):
        fields = Fields(record)
        key = fields.text("relation_id"), fields.text("target_id")
        snippets[key] = snippets.get(key, ()) + tuple(
            part.text("text") for part in fields.parts("samples")
        )
        problems += [problem.at(f"{records.origin}, record {index}") for problem in fields.problems]
    if problems:
        raise ConfigError(problems)
    return snippets, records.digest
