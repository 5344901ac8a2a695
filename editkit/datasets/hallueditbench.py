"""HalluEditBench (Huang et al. 2024, arXiv 2410.16251): facts that a model answers wrongly. A table
has those of one topic and one model.

    topic, subject, relation, object        the fact; object is the right answer
    question                                the question of the edit
    output_<model>, eval_<model>            the model's own wrong answer, and 0
    paraphrased_question                    another wording of the question
    yes_question, no_question               questions that Yes and No answer after the edit
    multiple_choice_with_letters,           the choices after the question, and the letter of the
    multiple_choice_labels                  right one; multiple_choices has them without letters
    reversed_relation_question              its answer is the subject
    question_<n>hop, answer_<n>hop          n from 2 to 6, the edited fact counted
    locality_question                       another attribute of the subject, without an answer

The layout was read in `data/questions/hallucination_final/*/*.csv` and `code/edit_all_method.py` of
llm-editing/HalluEditBench. The robustness of answers in several turns is a matter of prompts, which
are not in the tables, and is not measured.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

from editkit.datasets.base import AbstractFullPrompts
from editkit.datasets.fields import Fields
from editkit.datasets.files import AbstractRecordFiles, read_csv, read_folder
from editkit.datasets.records import Reader
from editkit.types import EditRequest, Probe

_HOPS = {2: "two_hop", 3: "three_hop", 4: "four_hop", 5: "five_hop", 6: "six_hop"}


@dataclass(frozen=True, kw_only=True)
class HalluEditBench(AbstractRecordFiles, AbstractFullPrompts):
    """Facts that a model hallucinates, with questions of eleven kinds."""

    advice: ClassVar[str] = (
        "The files: https://github.com/llm-editing/HalluEditBench, folder "
        "data/questions/hallucination_final"
    )
    read: ClassVar[Reader] = functools.partial(read_folder, read=read_csv, suffix="csv")

    path: str | None  # the table of a topic, or the folder of a model's topics

    def parse(self, fields: Fields, index: int) -> list[EditRequest]:
        prompt, subject = self.located(fields, "question", self.subject_of(fields, "subject"))
        target = fields.text("object")
        paraphrase = fields.filled("paraphrased_question")
        other = fields.filled("locality_question")
        # The table has no answer. The question is only compared with the unedited model, at the
        # tokens of the edit's own target under teacher forcing.
        locality = () if other is None else (Probe(prompt=other, answer=target),)
        return [
            EditRequest(
                id=f"{self.name}/{index}",
                prompt=prompt,
                subject=subject,
                target=target,
                target_old=_output(fields, target),
                paraphrases=() if paraphrase is None else (paraphrase,),
                locality={"relation_specificity": locality} if locality else {},
                portability=_portability(fields),
            )
        ]


def _output(fields: Fields, target: str) -> str | None:
    """The wrong answer of the table's model."""
    outputs = [fields.filled(name) for name in fields.names() if name.startswith("output_")]
    return next((output for output in outputs if output not in (None, target)), None)


def _portability(fields: Fields) -> dict[str, tuple[Probe, ...]]:
    """The questions about the edited fact, by kind."""
    choices = fields.filled("multiple_choice_with_letters")
    asked = {
        "yes": (fields.filled("yes_question"), "Yes"),
        "no": (fields.filled("no_question"), "No"),
        "multiple_choice": (
            None if choices is None else f"{fields.text('question')} {choices}",
            fields.filled("multiple_choice_labels"),
        ),
        "reversed": (fields.filled("reversed_relation_question"), fields.filled("subject")),
    }
    for hops, kind in _HOPS.items():
        asked[kind] = (fields.filled(f"question_{hops}hop"), fields.filled(f"answer_{hops}hop"))
    probes: dict[str, tuple[Probe, ...]] = {}
    for kind, (question, answer) in asked.items():
        if question is not None and answer is not None:
            probes[kind] = (Probe(prompt=question, answer=answer),)
        elif question is not None or (answer is not None and kind in _HOPS.values()):
            fields.leave_out(f"{kind}: no {'answer' if answer is None else 'question'}")
    return probes
