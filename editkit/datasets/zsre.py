"""zsRE in MEND's layout (Mitchell et al. 2022, arXiv 2110.11309).

The keys are src, subject, alt, answers, rephrase, loc and loc_ans. Some files add portability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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

_ADVICE = "The file: https://rome.baulab.info/data/dsets/zsre_mend_eval.json"


@dataclass(frozen=True, kw_only=True)
class ZsRE(AbstractFullPrompts):
    """Questions with a target answer, a rephrased question and an unrelated question of Natural
    Questions.
    """

    name: str
    path: str | None
    file: str  # file in $EDITKIT_DATA, used if path is null
    id: str | None  # hub dataset, used if there is no file
    # alt: the counterfactual (EasyEdit, D4S, EAC, PRUNE); answers: the first true answer (MEMIT)
    target: Literal["alt", "answers"]
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
        subject = self.subject_of(fields, "subject")
        answers = fields.texts("answers")
        if fields.get("answers") == []:
            fields.note("answers", "is empty", expected="at least one true answer")
        if self.target == "alt":
            target = fields.text("alt")
            # A few alternatives are true answers. Such a record must not be compared with its own
            # target.
            target_old = next((answer for answer in answers if answer != target), None)
            if target in answers:
                fields.remark("alt is one of the true answers")
        else:
            # The correction setting has no old target, because the file does not have the model's
            # own answer (`pred` is another model's).
            target, target_old = next(iter(answers), ""), None
        unrelated = Probe(prompt=_question(fields.text("loc")), answer=fields.text("loc_ans"))
        prompt, subject = self.located(fields, "src", subject)
        return [
            EditRequest(
                id=f"{self.name}/{index}",
                prompt=prompt,
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
    # Unrelated questions have no question mark, unlike all others. MEMIT adds it, EasyEdit does
    # not.
    return text if text.endswith("?") else f"{text}?"


def _portability(fields: Fields) -> dict[str, tuple[Probe, ...]]:
    question, answer = (
        fields.text("portability.New Question"),
        fields.text("portability.New Answer"),
    )
    return {"one_hop": (Probe(prompt=question, answer=answer),)}
