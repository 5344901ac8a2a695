"""zsRE in MEND's layout (Mitchell et al. 2022, arXiv 2110.11309).

src, subject, alt, answers, rephrase, loc, loc_ans; some files add portability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from editkit.datasets.base import AbstractDataset, LoadedDataset, OnBadRecord, Order, load_records
from editkit.datasets.fields import Fields
from editkit.datasets.records import find_records
from editkit.types import EditRequest, Probe

_ADVICE = "The file: https://rome.baulab.info/data/dsets/zsre_mend_eval.json"


@dataclass(frozen=True, kw_only=True)
class ZsRE(AbstractDataset):
    """Questions with an answer to write, one rephrased question and one unrelated question of
    Natural Questions.
    """

    name: str
    path: str | None
    file: str  # looked for below $EDITKIT_DATA when path is null
    id: str | None  # hub dataset, the last resort
    target: Literal[
        "alt", "answers"
    ]  # the counterfactual (EasyEdit, D4S, EAC, PRUNE), or the first true answer (MEMIT)
    order: Order
    limit: int | None
    on_bad_record: OnBadRecord

    def load(self, seed: int) -> LoadedDataset:
        return load_records(
            find_records(path=self.path, files=[self.file], hub_id=self.id, advice=_ADVICE),
            self._parse,
            name=self.name,
            order=self.order,
            seed=seed,
            limit=self.limit,
            on_bad_record=self.on_bad_record,
            variant={"target": self.target},
        )

    def _parse(self, fields: Fields, index: int) -> list[EditRequest]:
        subject = fields.text("subject")
        answers = fields.texts("answers")
        if fields.get("answers") == []:
            fields.note("answers", "is empty", allowed="at least one true answer is needed")
        if self.target == "alt":
            target = fields.text("alt")
            # A few alternatives are true answers too; such a record is not judged against itself.
            target_old = next((answer for answer in answers if answer != target), None)
            if target in answers:
                fields.remark("alt is one of the true answers")
        else:
            # The correction setting has no counterpart: what the model would have said is not in
            # the file (`pred` is another model's).
            target, target_old = next(iter(answers), ""), None
        unrelated = Probe(prompt=_question(fields.text("loc")), answer=fields.text("loc_ans"))
        return [
            EditRequest(
                id=f"{self.name}/{index}",
                prompt=fields.template_of("src", subject),
                subject=subject,
                target=target,
                target_old=target_old,
                paraphrases=(fields.text("rephrase"),),
                locality={"out_of_distribution": (unrelated,)},
                portability={}
                if fields.get("portability") is None or self.target != "alt"
                else _portability(fields),
            )
        ]


def _question(text: str) -> str:
    # The unrelated questions lack the mark that all others end with (MEMIT adds it, EasyEdit does
    # not).
    return text if text.endswith("?") else f"{text}?"


def _portability(fields: Fields) -> dict[str, tuple[Probe, ...]]:
    question, answer = (
        fields.text("portability.New Question"),
        fields.text("portability.New Answer"),
    )
    return {"one_hop": (Probe(prompt=question, answer=answer),)}
