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
from typing import ClassVar

from editkit.datasets.base import AbstractFullPrompts
from editkit.datasets.fields import Fields
from editkit.datasets.files import AbstractRecordFiles
from editkit.types import EditRequest, Probe


@dataclass(frozen=True, kw_only=True)
class QAEdit(AbstractRecordFiles, AbstractFullPrompts):
    """Questions with their right answers, a rephrased question and unrelated questions."""

    advice: ClassVar[str] = (
        "The files: https://github.com/WanliYoung/Revisit-Editing-Evaluation, folder data"
    )

    def parse(self, fields: Fields, index: int) -> list[EditRequest]:
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
