"""CounterFact (Meng et al. 2022, arXiv 2202.05262), in its original layout and in the flat one of EasyEdit, told apart by their keys.

original   requested_rewrite {prompt with "{}", subject, target_new.str, target_true.str}, paraphrase_prompts, neighborhood_prompts
flat       prompt, subject, target_new, ground_truth, rephrase_prompt, locality_prompt, locality_ground_truth
"""

from __future__ import annotations

from dataclasses import dataclass

from editkit.datasets.base import AbstractDataset, LoadedDataset, OnBadRecord, Order, arrange, parse_records
from editkit.datasets.records import Fields, find_records
from editkit.types import EditRequest, Probe

_ADVICE = "The original file: https://rome.baulab.info/data/dsets/counterfact.json"


@dataclass(frozen=True, kw_only=True)
class CounterFact(AbstractDataset):
    """Counterfactual completions, with paraphrases and with neighbours that share the true target."""

    name: str
    path: str | None
    file: str  # looked for below $EDITKIT_DATA when path is null
    id: str | None  # hub dataset, the last resort
    order: Order
    limit: int | None
    on_bad_record: OnBadRecord

    def load(self, seed: int) -> LoadedDataset:
        records = find_records(path=self.path, file=self.file, hub_id=self.id, advice=_ADVICE)
        requests, skipped = parse_records(records, self._parse, on_bad_record=self.on_bad_record)
        arranged = arrange(requests, order=self.order, seed=seed, limit=self.limit)
        return LoadedDataset(name=self.name, requests=arranged, digest=records.digest, origin=records.origin, skipped=skipped)

    def _parse(self, fields: Fields, index: int) -> EditRequest:
        case_id = fields.get("case_id")
        request_id = f"{self.name}/{index if case_id is None else case_id}"
        if fields.get("requested_rewrite") is not None:
            return _parse_original(fields, request_id)
        if fields.get("prompt") is None:
            fields.note("record", "has neither requested_rewrite (original layout) nor prompt (flat layout)")
        return _parse_flat(fields, request_id)


def _parse_original(fields: Fields, request_id: str) -> EditRequest:
    subject = fields.text("requested_rewrite.subject")
    true = fields.text("requested_rewrite.target_true.str")
    return _distinct_targets(
        fields,
        EditRequest(
            id=request_id,
            prompt=fields.template("requested_rewrite.prompt", subject),
            subject=subject,
            target=fields.text("requested_rewrite.target_new.str"),
            target_old=true,
            paraphrases=fields.texts("paraphrase_prompts"),
            # Neighbours are subjects for which the same object is true.
            neighbours=tuple(Probe(prompt=prompt, answer=true) for prompt in fields.texts("neighborhood_prompts")),
        ),
        key="requested_rewrite.target_new.str",
    )


def _parse_flat(fields: Fields, request_id: str) -> EditRequest:
    subject = fields.text("subject")
    has_locality = fields.get("locality_prompt") is not None
    return _distinct_targets(
        fields,
        EditRequest(
            id=request_id,
            prompt=fields.template_of("prompt", subject),
            subject=subject,
            target=fields.text("target_new"),
            target_old=fields.text("ground_truth"),
            paraphrases=() if fields.get("rephrase_prompt") is None else (fields.text("rephrase_prompt"),),
            neighbours=(Probe(prompt=fields.text("locality_prompt"), answer=fields.text("locality_ground_truth")),) if has_locality else (),
        ),
        key="target_new",
    )


def _distinct_targets(fields: Fields, request: EditRequest, *, key: str) -> EditRequest:
    if request.target == request.target_old:
        fields.note(key, "is the same as the true target: nothing to edit")
    return request
