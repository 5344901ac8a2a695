"""How well edits took: the protocols `probability` and `argmax`, from one pass of the scoring engine.

probability  (Meng et al. 2022, arXiv 2202.05262, section 3.4; PRUNE, arXiv 2405.16821, section 5.1) P is the length-normalised probability
             exp(mean log-prob of the target's tokens). Efficacy: P(target) > P(old target) after the prompt; generalization: the same after
             the paraphrases; locality: P(true answer) > P(target) after the neighbours; score: their harmonic mean; a `_magnitude` is the
             mean difference of the two P, in [-1, 1].
argmax       teacher-forced. Efficacy, generalization, portability: every token of the target is the greedy choice. Locality: at the
             positions of a neighbour's answer the greedy tokens are those of the unedited model, frozen at step 0.

A request's score is the mean over its prompts, a metric the mean over requests: n counts requests, and the standard error is over requests.
A metric for which no request has a prompt is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from editkit.errors import ConfigError
from editkit.evaluation.base import AbstractEvaluator, Measurement, harmonic_mean, mean_and_stderr
from editkit.evaluation.scoring import Score, score
from editkit.lazy import torch
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

Protocol = Literal["probability", "argmax"]
Scores = Mapping[Probe, Score]
Frozen = Mapping[str, Sequence[int]]  # request id -> the unedited model's greedy tokens at its neighbours' answers, one after another


@dataclass(frozen=True, slots=True)
class _Outcome:
    """One prompt's contribution: in [0, 1], or a difference of probabilities for a magnitude."""

    value: float
    is_finite: bool = True


def _targets(request: EditRequest, prompts: Sequence[str]) -> list[tuple[Probe, Probe]]:
    """(new target, old target) after each prompt; nothing where the request knows no old target."""
    if request.target_old is None:
        return []
    return [(Probe(prompt=prompt, answer=request.target), Probe(prompt=prompt, answer=request.target_old)) for prompt in prompts]


def _neighbour_targets(request: EditRequest) -> list[tuple[Probe, Probe]]:
    """(true answer, new target) after each neighbour; a neighbour whose true answer is the new target has nothing to be compared with."""
    return [(probe, Probe(prompt=probe.prompt, answer=request.target)) for probe in request.neighbours if probe.answer != request.target]


# What should be more probable than what, by metric.
_COMPARISONS: dict[str, Callable[[EditRequest], list[tuple[Probe, Probe]]]] = {
    "efficacy": lambda request: _targets(request, [request.full_prompt]),
    "generalization": lambda request: _targets(request, request.paraphrases),
    "locality": _neighbour_targets,
}

# What should be answered greedily, by metric.
_ANSWERS: dict[str, Callable[[EditRequest], list[Probe]]] = {
    "efficacy": lambda request: [Probe(prompt=request.full_prompt, answer=request.target)],
    "generalization": lambda request: [Probe(prompt=prompt, answer=request.target) for prompt in request.paraphrases],
    "portability": lambda request: [probe for probes in request.portability.values() for probe in probes],
}


def probes_of(request: EditRequest, protocols: Sequence[Protocol]) -> Iterator[Probe]:
    """All that must be scored for a request, possibly more than once."""
    if "probability" in protocols:
        for compared in _COMPARISONS.values():
            for better, worse in compared(request):
                yield from (better, worse)
    if "argmax" in protocols:
        for answered in _ANSWERS.values():
            yield from answered(request)
        yield from request.neighbours


def measure_probability(requests: Sequence[EditRequest], scores: Scores) -> list[Measurement]:
    """Efficacy, generalization, locality, their magnitudes and their harmonic mean."""
    shares: list[Measurement] = []
    magnitudes: list[Measurement] = []
    for metric, compared in _COMPARISONS.items():
        pairs = [[(scores[better], scores[worse]) for better, worse in compared(request)] for request in requests]
        shares += _measurements("probability", metric, [[_is_greater(*pair) for pair in of_request] for of_request in pairs])
        differences = [[_difference(*pair) for pair in of_request] for of_request in pairs]
        magnitudes += _measurements("probability", f"{metric}_magnitude", differences)
    values = [share.value for share in shares if share.value is not None]
    if len(values) < len(_COMPARISONS):
        return shares + magnitudes
    combined = Measurement(
        kind="editing",
        protocol="probability",
        metric="score",
        value=harmonic_mean(values),
        stderr=None,
        n=len(requests),
        nonfinite=max(share.nonfinite for share in shares),
    )
    return [*shares, combined, *magnitudes]


def measure_argmax(requests: Sequence[EditRequest], scores: Scores, frozen: Frozen) -> list[Measurement]:
    """Efficacy, generalization, locality and portability."""
    measured = {
        metric: _measurements("argmax", metric, [[_is_greedy(scores[probe]) for probe in answered(request)] for request in requests])
        for metric, answered in _ANSWERS.items()
    }
    locality = [_agreements([scores[probe] for probe in request.neighbours], frozen[request.id]) for request in requests]
    return [
        *measured["efficacy"],
        *measured["generalization"],
        *_measurements("argmax", "locality", locality),
        *measured["portability"],
    ]


def _is_greater(better: Score, worse: Score) -> _Outcome:
    is_finite = better.is_finite and worse.is_finite
    return _Outcome(float(is_finite and better.mean_log_prob > worse.mean_log_prob), is_finite)


def _difference(better: Score, worse: Score) -> _Outcome:
    # There is no number that a failure would have: the mean becomes None where a probability is not finite.
    is_finite = better.is_finite and worse.is_finite
    return _Outcome(better.probability - worse.probability if is_finite else math.nan, is_finite)


def _is_greedy(answer: Score) -> _Outcome:
    return _Outcome(float(answer.is_finite and answer.is_greedy), answer.is_finite)


def _agreements(neighbours: Sequence[Score], frozen: Sequence[int]) -> list[_Outcome]:
    outcomes: list[_Outcome] = []
    start = 0
    for neighbour in neighbours:
        before = tuple(frozen[start : start + len(neighbour.greedy)])
        start += len(neighbour.greedy)
        outcomes.append(_Outcome(float(neighbour.is_finite and neighbour.greedy == before), neighbour.is_finite))
    assert start == len(frozen), "the baseline belongs to other neighbours or to another tokenizer"
    return outcomes


def _measurements(protocol: Protocol, metric: str, outcomes: Sequence[Sequence[_Outcome]]) -> list[Measurement]:
    """The mean over requests of the mean over prompts, as the one measurement there is; none if no request has a prompt."""
    judged = [of_request for of_request in outcomes if of_request]
    if not judged:
        return []
    mean, stderr = mean_and_stderr([math.fsum(outcome.value for outcome in of_request) / len(of_request) for of_request in judged])
    nonfinite = sum(not all(outcome.is_finite for outcome in of_request) for of_request in judged)
    return [
        Measurement(
            kind="editing",
            protocol=protocol,
            metric=metric,
            value=mean,
            stderr=stderr,
            n=len(judged),
            nonfinite=nonfinite,
        )
    ]


@dataclass(frozen=True, kw_only=True)
class EditingEvaluator(AbstractEvaluator):
    """The chosen protocols over the same scores: no prompt runs twice for two protocols."""

    protocols: tuple[Protocol, ...]
    tokens_per_batch: int

    def __post_init__(self) -> None:
        unknown = [name for name in self.protocols if name not in get_args(Protocol)]
        if unknown:
            raise ConfigError([f"evaluation.protocols: {name!r} - allowed: {', '.join(get_args(Protocol))}" for name in unknown])

    def baseline(self, model: EditableModel, requests: Sequence[EditRequest]) -> dict[str, torch.Tensor]:
        """For each request id the greedy tokens at its neighbours' answers, one neighbour after another: int32, (tokens,)."""
        if "argmax" not in self.protocols:
            return {}
        scores = self._scores(model, requests)
        return {
            _key(request): torch.tensor([token for probe in request.neighbours for token in scores[probe].greedy], dtype=torch.int32)
            for request in requests
        }

    def evaluate(self, model: EditableModel, requests: Sequence[EditRequest], baseline: Mapping[str, torch.Tensor]) -> list[Measurement]:
        scores = self._scores(model, requests)
        measured: list[Measurement] = []
        if "probability" in self.protocols:
            measured += measure_probability(requests, scores)
        if "argmax" in self.protocols:
            measured += measure_argmax(requests, scores, {request.id: baseline[_key(request)].tolist() for request in requests})
        return measured

    def _scores(self, model: EditableModel, requests: Sequence[EditRequest]) -> dict[Probe, Score]:
        # The baseline asks everything too: the same batches before the first edit give the same bits, so that locality is exactly 1 there.
        probes = [probe for request in requests for probe in probes_of(request, self.protocols)]
        return score(model, probes, tokens_per_batch=self.tokens_per_batch)


def _key(request: EditRequest) -> str:
    return f"neighbours/{request.id}"
