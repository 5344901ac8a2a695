"""The protocol `probability`: comparisons of the probabilities of two answers.

Meng et al. 2022 (arXiv 2202.05262), section 3.4; PRUNE (arXiv 2405.16821), section 5.1. P is the
length-normalised probability exp(mean log-prob of the answer's tokens). Efficacy: P(target) > P(old
target) after the prompt; generalization: the same after the paraphrases; attribute: the same after
prompts of which the target has always been true; locality: P(true answer) > P(target) after the
neighbours. A `_magnitude` is the mean difference of the two P, in [-1, 1]. Locality does not use
the unedited model here, and only neighbours have an answer that the target competes with.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

from editkit.evaluation.protocols.base import (
    AbstractProtocol,
    Answers,
    Frozen,
    Kind,
    Questions,
    Verdicts,
    tallies,
)
from editkit.evaluation.scoring.teacher_forcing import Score
from editkit.evaluation.statistics.tally import Outcome
from editkit.types import Probe

Pair = tuple[Probe, Probe]  # the first should be more probable than the second


def comparisons(questions: Questions) -> dict[str, list[Pair]]:
    """The pairs by metric. There is none without an old target, and none for a neighbour whose true
    answer is the target.
    """
    request = questions.request
    by_metric: dict[str, list[Pair]] = {"efficacy": [], "generalization": [], "attribute": []}
    if (old := request.target_old) is not None:
        for metric, pairs in by_metric.items():
            for probe in questions.expected.get((metric, None), ()):
                pairs.append((_with(probe, request.target), _with(probe, old)))
    by_metric["locality"] = [
        (probe, _with(probe, request.target))
        for probe in request.neighbours
        if probe.answer != request.target
    ]
    return {metric: pairs for metric, pairs in by_metric.items() if pairs}


def _with(probe: Probe, answer: str) -> Probe:
    return replace(probe, answer=answer, aliases=())


class Probability(AbstractProtocol):
    """Comparisons of length-normalised probabilities."""

    name: ClassVar[str] = "probability"

    def probes(self, questions: Questions) -> Iterator[Probe]:
        for pairs in comparisons(questions).values():
            for pair in pairs:
                yield from pair

    def assess(
        self, batch: Sequence[Questions], answers: Answers, frozen: Sequence[Frozen]
    ) -> Verdicts:
        results: list[dict[Kind, list[Outcome]]] = []
        for questions in batch:
            pairs = {
                metric: [
                    (answers.scores[better], answers.scores[worse]) for better, worse in compared
                ]
                for metric, compared in comparisons(questions).items()
            }
            outcomes: dict[Kind, list[Outcome]] = {
                (metric, None): [_is_greater(*pair) for pair in scored]
                for metric, scored in pairs.items()
            }
            outcomes |= {
                (f"{metric}_magnitude", None): [_difference(*pair) for pair in scored]
                for metric, scored in pairs.items()
            }
            results.append(outcomes)
        return Verdicts(tallies(self.name, results))


def _is_greater(better: Score, worse: Score) -> Outcome:
    is_finite = better.is_finite and worse.is_finite
    return Outcome(float(is_finite and better.mean_log_prob > worse.mean_log_prob), is_finite)


def _difference(better: Score, worse: Score) -> Outcome:
    # No number stands for a failure: the mean becomes None if a probability is not finite.
    is_finite = better.is_finite and worse.is_finite
    return Outcome(better.probability - worse.probability if is_finite else math.nan, is_finite)
