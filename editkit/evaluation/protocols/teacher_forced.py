"""The common part of the protocols `argmax` and `token`: teacher forcing. The model reads each
answer, and its greedy choices are compared.

Teacher forcing reveals the length of an answer and all of its tokens but the last (Yang et al.
2025, "The Mirage of Model Editing", arXiv 2502.11177). The protocol `generate` reveals nothing.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import ClassVar

from editkit.evaluation.protocols.base import (
    AbstractProtocol,
    Answers,
    Frozen,
    Kind,
    Questions,
    Verdicts,
    pieces,
    tallies,
)
from editkit.evaluation.scoring.teacher_forcing import Score
from editkit.evaluation.statistics.tally import Outcome
from editkit.lazy import torch
from editkit.types import Probe


class AbstractTeacherForced(AbstractProtocol):
    """Compares greedy tokens with those of the answer; for locality, with those of the unedited
    model.
    """

    frozen: ClassVar[tuple[str, ...]] = ("greedy",)

    @abc.abstractmethod
    def grade(self, greedy: Sequence[int], expected: Sequence[int]) -> float:
        """The agreement of greedy tokens with as many expected ones, in [0, 1]."""

    def probes(self, questions: Questions) -> Iterator[Probe]:
        for probes in questions.expected.values():
            yield from probes
        yield from questions.unchanged_probes

    def freeze(self, questions: Questions, answers: Answers) -> Frozen:
        """The greedy tokens at all answers that must stay, concatenated: int32, (tokens,)."""
        scores = [answers.scores[probe] for probe in questions.unchanged_probes]
        tokens = [token for score in scores for token in score.greedy]
        return {"greedy": torch.tensor(tokens, dtype=torch.int32)}

    def assess(
        self, batch: Sequence[Questions], answers: Answers, frozen: Sequence[Frozen]
    ) -> Verdicts:
        pairs = zip(batch, frozen, strict=True)
        return Verdicts(tallies(self.name, [self._outcomes(*pair, answers) for pair in pairs]))

    def _outcomes(
        self, questions: Questions, frozen: Frozen, answers: Answers
    ) -> dict[Kind, list[Outcome]]:
        outcomes = {
            kind: [self._graded(answers.scores[probe], None) for probe in probes]
            for kind, probes in questions.expected.items()
        }
        unchanged = questions.unchanged_probes
        sizes = [len(answers.scores[probe].greedy) for probe in unchanged]
        before = dict(zip(unchanged, pieces(frozen["greedy"].tolist(), sizes), strict=True))
        outcomes |= {
            kind: [self._graded(answers.scores[probe], before[probe]) for probe in probes]
            for kind, probes in questions.unchanged.items()
        }
        return outcomes

    def _graded(self, score: Score, before: Sequence[int] | None) -> Outcome:
        if not score.is_finite:
            return Outcome(0.0, is_finite=False)
        return Outcome(self.grade(score.greedy, score.tokens if before is None else before))
