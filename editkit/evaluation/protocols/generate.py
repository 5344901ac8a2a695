"""The protocol `generate`: greedy decoding of each prompt, with an end that the model chooses.

The end is the end token, a newline (`until`) or the cap of `max_new_tokens`, which does not depend
on the answer. Efficacy, generalization, portability, hop and attribute: exact match after SQuAD's
normalisation with the answer or one of its aliases; `_contains`: an answer is among the
generation's words; `_judged`: the judge's verdict. Locality: the normalised generation is that of
the unedited model, frozen at step 0. A text is never "not finite": what a broken model says is
judged like anything else.

Unlike teacher forcing, nothing reveals the answer or its length: 96.8 % there can be 38.5 % here
(Yang et al. 2025, "The Mirage of Model Editing", arXiv 2502.11177).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from editkit.datasets.separators import lead_of
from editkit.errors import OptionError, message
from editkit.evaluation.protocols.base import (
    AbstractProtocol,
    Answers,
    Decoding,
    Frozen,
    Kind,
    Questions,
    Verdicts,
    tallies,
)
from editkit.evaluation.protocols.judge import AbstractJudge, Generated, StringJudge
from editkit.evaluation.protocols.matching import contains, is_match, normalise
from editkit.evaluation.scoring.frozen_text import from_bytes, to_bytes
from editkit.evaluation.statistics.tally import Outcome
from editkit.types import Probe

Case = tuple[int, Kind, Probe]  # the index of the request, the metric and the prompt


@dataclass(frozen=True, kw_only=True)
class Generate(AbstractProtocol):
    """Free-running greedy decoding."""

    name: ClassVar[str] = "generate"
    frozen: ClassVar[tuple[str, ...]] = ("texts",)

    max_new_tokens: int = 32
    until: tuple[str, ...] = ("\n",)  # texts that end a generation and are no part of it
    judge: AbstractJudge | None = StringJudge()  # noqa: RUF009 (it is frozen)

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 1:
            got = self.max_new_tokens
            problems.append(
                message("max_new_tokens", "out of range", got=got, expected="at least 1")
            )
        if "" in self.until:
            problem = "holds an empty text, which would end every generation at once"
            problems.append(message("until", problem, got=list(self.until)))
        if problems:
            raise OptionError(problems)

    @property
    def decoding(self) -> Decoding:
        return Decoding(max_new_tokens=self.max_new_tokens, until=self.until)

    def prompts(self, questions: Questions) -> Iterator[str]:
        for probes in (*questions.expected.values(), questions.unchanged_probes):
            yield from map(lead_of, probes)

    def freeze(self, questions: Questions, answers: Answers) -> Frozen:
        """The generations of the request's different prompts, in their order, as JSON."""
        prompts = dict.fromkeys(self.prompts(questions))
        return {"texts": to_bytes([answers.texts[prompt] for prompt in prompts])}

    def thaw(self, questions: Questions, frozen: Frozen) -> dict[str, str]:
        """The unedited model's generations by the texts that they continue."""
        prompts = dict.fromkeys(self.prompts(questions))
        return dict(zip(prompts, from_bytes(frozen["texts"]), strict=True))

    def assess_before(self, batch: Sequence[Questions], frozen: Sequence[Frozen]) -> Verdicts:
        texts = {
            prompt: text
            for questions, tensors in zip(batch, frozen, strict=True)
            for prompt, text in self.thaw(questions, tensors).items()
        }
        return self.assess(batch, Answers({}, texts), frozen)

    def assess(
        self, batch: Sequence[Questions], answers: Answers, frozen: Sequence[Frozen]
    ) -> Verdicts:
        cases = [
            (index, kind, probe)
            for index, questions in enumerate(batch)
            for kind, probes in questions.expected.items()
            for probe in probes
        ]
        verdicts = self._verdicts(batch, cases, answers)
        outcomes: list[dict[Kind, list[Outcome]]] = [{} for _ in batch]
        rows: list[dict[str, Any]] = []
        for number, (index, (metric, task), probe) in enumerate(cases):
            text, right = answers.texts[lead_of(probe)], (probe.answer, *probe.aliases)
            scores = {
                metric: float(is_match(text, right)),
                f"{metric}_contains": float(contains(text, right)),
            }
            if verdicts is not None:
                scores[f"{metric}_judged"] = verdicts[number]
            for name, value in scores.items():
                outcome = Outcome(value) if math.isfinite(value) else Outcome(0.0, is_finite=False)
                outcomes[index].setdefault((name, task), []).append(outcome)
            if task is None:  # the kinds hold the same probes again
                rows.append(
                    _row(batch[index], metric, probe, text, answers=list(right), **_plain(scores))
                )
        for index, questions in enumerate(batch):
            before = self.thaw(questions, frozen[index])
            for kind, probes in questions.unchanged.items():
                same = [
                    float(normalise(answers.texts[lead]) == normalise(before[lead]))
                    for lead in map(lead_of, probes)
                ]
                outcomes[index][kind] = [Outcome(value) for value in same]
                if kind[1] is None:
                    rows += [
                        _row(
                            questions,
                            kind[0],
                            probe,
                            answers.texts[lead_of(probe)],
                            unedited=before[lead_of(probe)],
                            **{kind[0]: value},
                        )
                        for probe, value in zip(probes, same, strict=True)
                    ]
        return Verdicts(tallies(self.name, outcomes), tuple(rows))

    def _verdicts(
        self, batch: Sequence[Questions], cases: Sequence[Case], answers: Answers
    ) -> Sequence[float] | None:
        """The judge's verdicts by case; None without a judge."""
        if self.judge is None:
            return None
        generated = [
            Generated(
                prompt=probe.prompt,
                answers=(probe.answer, *probe.aliases),
                text=answers.texts[lead_of(probe)],
                old_answer=batch[index].request.target_old
                if metric in ("efficacy", "generalization")
                else None,
            )
            for index, (metric, _), probe in cases
        ]
        different = list(dict.fromkeys(generated))
        verdicts = dict(zip(different, self.judge.judge(different), strict=True))
        return [verdicts[generation] for generation in generated]


def _row(questions: Questions, metric: str, probe: Probe, text: str, **more: Any) -> dict[str, Any]:
    return {
        "request": questions.request.id,
        "metric": metric,
        "prompt": probe.prompt,
        "generation": text,
        **more,
    }


def _plain(scores: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in scores.items()}
