"""WikiBigEdit (Thede et al. 2025, arXiv 2503.05683): facts that changed in Wikidata, as questions.

    update, ans         the question and its answer after the change; the pipeline's own files have
                        src and alt instead
    subject             what the fact is about
    rephrase            another wording of the question
    personas            the question in the words of a persona; the pipeline's files: genv2_mixed
    mhop, mhop_ans      a question about the answer, where there is one (a few percent)
    loc, loc_ans        a question about a fact of a similar subject that did not change
    tag, relation, object are not used

The layout was read in the readers of it: `data/wikibigedit.py` of MINE-USTC/StableEdit for the
published files (hub dataset lukasthede/WikiBigEdit, one file for each of eight periods), and
`WikiBigEdit_Pipeline/combine_qa.py` of ExplainableML/WikiBigEdit for those of the pipeline. Empty
cells are null, NaN or blank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

from editkit.datasets.base import AbstractFullPrompts
from editkit.datasets.fields import Fields
from editkit.datasets.files import AbstractRecordFiles, read_folder, read_list_or_lines
from editkit.datasets.records import Reader
from editkit.types import EditRequest, Probe


@dataclass(frozen=True, kw_only=True)
class WikiBigEdit(AbstractRecordFiles, AbstractFullPrompts):
    """Changed facts of Wikidata, period by period."""

    advice: ClassVar[str] = "The files: https://huggingface.co/datasets/lukasthede/WikiBigEdit"
    read: ClassVar[Reader] = functools.partial(read_folder, read=read_list_or_lines)

    path: str | None  # a file, or a folder of files, whose names are in the order of the periods
    hub_file: str | None  # the file in its repository; *.json: all

    @property
    def file_on_hub(self) -> str | None:
        return self.hub_file

    def parse(self, fields: Fields, index: int) -> list[EditRequest]:
        from_pipeline = fields.get("update") is None and fields.get("src") is not None
        question, answer = ("src", "alt") if from_pipeline else ("update", "ans")
        target = fields.text(answer)
        prompt, subject = self.located(fields, question, self.subject_of(fields, "subject"))
        paraphrase = fields.filled("rephrase")
        persona = fields.filled("genv2_mixed" if from_pipeline else "personas")
        portability = {
            "personas": () if persona is None else (Probe(prompt=persona, answer=target),),
            "multi_hop": _probe(fields, "mhop"),
        }
        unchanged = _probe(fields, "loc")
        return [
            EditRequest(
                id=f"{self.name}/{index}",
                prompt=prompt,
                subject=subject,
                target=target,
                paraphrases=() if paraphrase is None else (paraphrase,),
                locality={"unchanged_fact": unchanged} if unchanged else {},
                portability={kind: probes for kind, probes in portability.items() if probes},
            )
        ]


def _probe(fields: Fields, key: str) -> tuple[Probe, ...]:
    """A question with its answer; none if the record has none."""
    question, answer = fields.filled(key), fields.filled(f"{key}_ans")
    if question is not None and answer is None:
        fields.leave_out(f"{key}: no answer")
    return () if question is None or answer is None else (Probe(prompt=question, answer=answer),)
