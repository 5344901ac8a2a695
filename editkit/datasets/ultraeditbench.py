"""UltraEditBench (Gu et al. 2025, arXiv 2505.14679): two million facts of Wikidata as questions.

    prompt, ans         the question and the answer to write
    subject             what the fact is about
    rephrase_prompt     another wording of the question
    loc, loc_ans        a question about an unrelated fact, of the same kind

The layout was read in the benchmark's readers, `data/ultraeditbench.py` of lin-fulong/LPD-Edit and
EasyEdit's example for UltraEdit. The README of XiaojieGu/UltraEdit writes the hub dataset
XiaojieGu/UltraEditBench as JSON lines, the readers expect a JSON list: both are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from editkit.datasets.base import AbstractFullPrompts
from editkit.datasets.fields import Fields
from editkit.datasets.files import AbstractRecordFiles, read_list_or_lines
from editkit.datasets.records import Reader
from editkit.types import EditRequest, Probe


@dataclass(frozen=True, kw_only=True)
class UltraEditBench(AbstractRecordFiles, AbstractFullPrompts):
    """Questions with an answer, a rephrased question and an unrelated question."""

    advice: ClassVar[str] = "The file: https://huggingface.co/datasets/XiaojieGu/UltraEditBench"
    read: ClassVar[Reader] = staticmethod(read_list_or_lines)

    def parse(self, fields: Fields, index: int) -> list[EditRequest]:
        prompt, subject = self.located(fields, "prompt", self.subject_of(fields, "subject"))
        unrelated = Probe(prompt=fields.text("loc"), answer=fields.text("loc_ans"))
        return [
            EditRequest(
                id=f"{self.name}/{index}",
                prompt=prompt,
                subject=subject,
                target=fields.text("ans"),
                paraphrases=(fields.text("rephrase_prompt"),),
                locality={"unrelated": (unrelated,)},
            )
        ]
