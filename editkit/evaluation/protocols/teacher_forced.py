"""What the protocols `argmax` and `token` share: the model reads each answer as if it had said it,
and its greedy choices are compared.

So the model is told an answer's length and all of it but its last token (Yang et al. 2025, "The
Mirage of Model Editing", arXiv 2502.11177); `generate` tells it nothing.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import ClassVar

from editkit.evaluation.protocols.base import (
    AbstractProtocol,
    Frozen,
    Kind,
    Questions,
    Said,
    Verdicts,
    pieces,
    tallies,
)
from editkit.evaluation.scoring.teacher_forcing import Score
from editkit.evaluation.statistics.tally import Outcome
from editkit.lazy import torch
from editkit.types import Probe


class AbstractTeacherForced(AbstractProtocol):
    """Judges an answer's greedy tokens against its own, and where something must stay, against the
    unedited model's.
    """

    frozen: ClassVar[tuple[str, ...]] = ("greedy",)

    @abc.abstractmethod
    def grade(self, greedy: Sequence[int], expected: Sequence[int]) -> float:
        """How well an answer's greedy tokens agree with as many others, in [0, 1]."""

    def probes(self, asked: Questions) -> Iterator[Probe]:
        for probes in asked.new.values():
            yield from probes
        yield from asked.stays

    def freeze(self, asked: Questions, said: Said) -> Frozen:
        """The greedy tokens at all answers that must stay, one answer after another: int32,
        (tokens,).
        """
        return {
            "greedy": torch.tensor(
                [token for probe in asked.stays for token in said.scores[probe].greedy],
                dtype=torch.int32,
            )
        }

    def assess(self, asked: Sequence[Questions], said: Said, frozen: Sequence[Frozen]) -> Verdicts:
        return Verdicts(
            tallies(
                self.name, [self._outcomes(*each, said) for each in zip(asked, frozen, strict=True)]
            )
        )

    def _outcomes(self, asked: Questions, frozen: Frozen, said: Said) -> dict[Kind, list[Outcome]]:
        found = {
            kind: [self._graded(said.scores[probe], None) for probe in probes]
            for kind, probes in asked.new.items()
        }
        sizes = [len(said.scores[probe].greedy) for probe in asked.stays]
        before = dict(zip(asked.stays, pieces(frozen["greedy"].tolist(), sizes), strict=True))
        found |= {
            kind: [self._graded(said.scores[probe], before[probe]) for probe in probes]
            for kind, probes in asked.kept.items()
        }
        return found

    def _graded(self, score: Score, before: Sequence[int] | None) -> Outcome:
        if not score.is_finite:
            return Outcome(0.0, is_finite=False)
        return Outcome(self.grade(score.greedy, score.tokens if before is None else before))
