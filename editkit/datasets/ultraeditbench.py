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

from editkit.datasets.base import (
    AbstractFullPrompts,
    LoadedDataset,
    OnBadRecord,
    Order,
    load_records,
)
from editkit.datasets.fields import Fields
from editkit.datasets.files import read_list_or_lines
from editkit.datasets.records import find_records
from editkit.types import EditRequest, Probe

_ADVICE = "The file: https://huggingface.co/datasets/XiaojieGu/UltraEditBench"


@dataclass(frozen=True, kw_only=True)
class UltraEditBench(AbstractFullPrompts):
    """Questions with an answer, a rephrased question and an unrelated question."""

    name: str
    path: str | None
    files: tuple[str, ...]  # the first of them that exists in $EDITKIT_DATA is used if path is null
    id: str | None  # hub dataset, used if there is no file
    order: Order
    limit: int | None
    on_bad_record: OnBadRecord

    def load(self, seed: int) -> LoadedDataset:
        return load_records(
            find_records(
                path=self.path,
                files=self.files,
                hub_id=self.id,
                advice=_ADVICE,
                read=read_list_or_lines,
            ),
            self._parse,
            name=self.name,
            order=self.order,
            seed=seed,
            limit=self.limit,
            on_bad_record=self.on_bad_record,
        )

    def _parse(self, fields: Fields, index: int) -> list[EditRequest]:
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
