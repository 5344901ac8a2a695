"""QAEdit (Yang et al. 2025, arXiv 2502.11177): questions of Natural Questions, TriviaQA and
SimpleQA.

    id, source          a number, and NQ, TQA or SQA; neither is used
    prompt, target      the question and its right answer
    subject             what the question is about, as it stands in it
    rephrase            another wording of the question
    locality            [{loc, loc_ans}]: unrelated questions of Natural Questions

The layout was read in `data/QAEdit_inter_1k.json` of WanliYoung/Revisit-Editing-Evaluation, the
thousand questions that all models of the paper answer wrongly. The whole set is the hub dataset
WenDingY/QAEdit. The paper judges freely generated answers: the protocol `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from editkit.datasets.base import (
    AbstractFullPrompts,
    LoadedDataset,
    OnBadRecord,
    Order,
    load_records,
)
from editkit.datasets.fields import Fields
from editkit.datasets.records import find_records
from editkit.types import EditRequest, Probe

_ADVICE = "The files: https://github.com/WanliYoung/Revisit-Editing-Evaluation, folder data"


@dataclass(frozen=True, kw_only=True)
class QAEdit(AbstractFullPrompts):
    """Questions with their right answers, a rephrased question and unrelated questions."""

    name: str
    path: str | None
    files: tuple[str, ...]  # the first of them that exists in $EDITKIT_DATA is used if path is null
    id: str | None  # hub dataset, used if there is no file
    order: Order
    limit: int | None
    on_bad_record: OnBadRecord

    def load(self, seed: int) -> LoadedDataset:
        return load_records(
            find_records(path=self.path, files=self.files, hub_id=self.id, advice=_ADVICE),
            self._parse,
            name=self.name,
            order=self.order,
            seed=seed,
            limit=self.limit,
            on_bad_record=self.on_bad_record,
        )

    def _parse(self, fields: Fields, index: int) -> list[EditRequest]:
        prompt, subject = self.located(fields, "prompt", self.subject_of(fields, "subject"))
        unrelated = tuple(
            Probe(prompt=part.text("loc"), answer=part.text("loc_ans"))
            for part in fields.parts("locality")
        )
        return [
            EditRequest(
                id=f"{self.name}/{index}",
                prompt=prompt,
                subject=subject,
                target=fields.text("target"),
                paraphrases=(fields.text("rephrase"),),
                locality={"out_of_distribution": unrelated} if unrelated else {},
            )
        ]
