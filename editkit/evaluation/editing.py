"""Editing metrics: how well edits took, held, and left alone what they should. One pass of the
model serves all protocols.

A request's score is the mean over its prompts. A metric is the mean over requests, or over prompts
(`aggregation`). A metric for which no request has a prompt is omitted. Besides the metrics over all
requests there are these, marked as such:

    blocks         the same for blocks of consecutive edits: how each block holds while later edits
                   follow (D4S, arXiv 2410.23843, Figures 4 and 8)
    succeeded      locality on the requests whose edit succeeded by the same protocol; an edit that
                   does nothing leaves everything as it was
    known_before   the metrics on requests that the unedited model passed; unknown_before, on others
    immediate      the scores right after each request's own edit
    forgetting     in the metric's name: the mean of what each request has lost since then

The answers of the unedited model are frozen at step 0, and its scores with them. `specificity`
takes the prompts of locality and asks whether the true answer is right (MEMIT, arXiv 2210.07229, on
zsRE). Locality asks whether the answer is still the unedited model's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from editkit.errors import OptionError, message
from editkit.evaluation.base import AbstractEditEvaluator, AbstractEvaluator, Moment, Samples
from editkit.evaluation.fluency import Fluency
from editkit.evaluation.kept_scores import (
    BEFORE,
    IDS,
    NOTED,
    ROWS,
    metrics_in,
    noted_scores,
    score_key,
    scores_before,
)
from editkit.evaluation.perplexity import Perplexity
from editkit.evaluation.protocols.argmax import Argmax
from editkit.evaluation.protocols.ask import ask_all, samples_name, samples_of
from editkit.evaluation.protocols.base import (
    AbstractProtocol,
    Answers,
    Frozen,
    Questions,
    frozen_key,
    in_context,
    unknown_protocols,
)
from editkit.evaluation.protocols.distribution import Distribution
from editkit.evaluation.protocols.generate import Generate
from editkit.evaluation.protocols.probability import Probability
from editkit.evaluation.protocols.token import Token
from editkit.evaluation.scoring.frozen_text import from_bytes, to_bytes
from editkit.evaluation.statistics import subsets as breakdown
from editkit.evaluation.statistics.tally import (
    Aggregation,
    Judged,
    Metric,
    Statistics,
    Tally,
    as_rows,
)
from editkit.evaluation.thresholds import Thresholds
from editkit.lazy import torch
from editkit.model.tokens import PLACE
from editkit.types import EditRequest, Measurement, Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


@dataclass(frozen=True, kw_only=True)
class EditingEvaluator(AbstractEditEvaluator):
    """The chosen protocols over the same answers: no prompt runs twice for two protocols.

    Raises:
        OptionError: an option is out of range, or a protocol is unknown.
    """

    protocols: tuple[str, ...]
    tokens_per_batch: int
    block_size: int | None = None  # edits; None: no blocks
    aggregation: Aggregation = "request"
    bootstrap: int = 0  # resamples for 95 % confidence intervals; 0: none
    context: str = PLACE  # the template around every prompt
    attribute_prompts: bool = False  # measure CounterFact's too, which double its prompts
    specificity: bool = False  # whether locality's prompts are judged by their true answers too
    generate: Generate = field(default_factory=Generate)
    distribution: Distribution = field(default_factory=Distribution)
    fluency: Fluency = field(
        default_factory=lambda: Fluency(limit=0, max_tokens=100, top_k=5, seed=0)
    )
    perplexity: Perplexity = field(
        default_factory=lambda: Perplexity(path=None, max_tokens=None, window=512)
    )
    thresholds: Thresholds = field(default_factory=Thresholds)  # read by reports alone
    own: tuple[AbstractProtocol, ...] = ()  # the user's own protocols, besides the shipped ones

    def __post_init__(self) -> None:
        problems = unknown_protocols(self.protocols, self.own)
        if self.context.count(PLACE) != 1:
            expected = f"exactly one {PLACE}, which stands for the prompt"
            problems.append(
                message("context", "invalid template", got=self.context, expected=expected)
            )
        least = {"tokens_per_batch": (self.tokens_per_batch, 1)}
        least |= {"bootstrap": (self.bootstrap, 0)}
        if self.block_size is not None:
            least |= {"block_size": (self.block_size, 1)}
        problems += [
            message(key, "out of range", got=value, expected=f"at least {limit}")
            for key, (value, limit) in least.items()
            if value < limit
        ]
        if problems:
            raise OptionError(problems)

    def evaluators(self) -> dict[str, AbstractEvaluator]:
        """The evaluators of these options, by the names under which a run keeps their baselines."""
        evaluators: dict[str, AbstractEvaluator] = {"editing": self} if self.protocols else {}
        if self.fluency.limit != 0:
            evaluators["fluency"] = replace(self.fluency, tokens_per_batch=self.tokens_per_batch)
        if self.perplexity.path is not None:
            evaluators["perplexity"] = replace(
                self.perplexity, tokens_per_batch=self.tokens_per_batch
            )
        return evaluators

    def baseline(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> dict[str, torch.Tensor]:
        """The tensors that each protocol freezes of each request, the scores before the first edit,
        and the ids of the requests.
        """
        if not self.protocols:
            return {}
        # All protocols are asked everything, as at later measurements: equal batches give equal
        # bits, so that without an edit locality is exactly 1.
        batch = self._questions(requests)
        answers = self._answers(model, batch, None)
        frozen = {
            protocol.name: [
                protocol.freeze(questions, answers[protocol.name]) for questions in batch
            ]
            for protocol in self._chosen()
        }
        tensors = {
            frozen_key(protocol, name, request): tensor
            for protocol in self._chosen()
            for request, own in zip(requests, frozen[protocol.name], strict=True)
            for name, tensor in own.items()
        }
        judged, _ = self._assess(batch, answers, frozen)
        scores = {score_key(BEFORE, metric): as_rows(tally) for metric, tally in judged.items()}
        return tensors | scores | {IDS: to_bytes([request.id for request in requests])}

    def measure(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> list[Measurement | Samples]:
        if not requests or not self.protocols:
            return []
        before = self._ordered(scores_before(requests, baseline))
        if moment.is_before:  # the baseline holds the scores
            judged, samples = before, self._samples_before(requests, baseline)
        else:
            judged, samples = self._judge(model, requests, baseline)
        noted = self._ordered(noted_scores(notes, moment))
        results: list[Measurement | Samples] = [
            *self._measurements(breakdown.everything(judged, self._statistics)),
            *self._measurements(
                breakdown.blocks(judged, moment.positions, self.block_size, self._statistics)
            ),
        ]
        if not moment.is_before:
            results += self._measurements(breakdown.succeeded(judged, self._statistics))
            results += self._measurements(breakdown.known_before(judged, before, self._statistics))
        if noted:
            results += self._measurements(breakdown.forgetting(judged, noted, self._statistics))
            results += self._measurements(
                breakdown.everything(noted, self._statistics), timing="immediate"
            )
        return results + list(samples)

    def note(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> dict[str, torch.Tensor]:
        """Adds a row for each request, (edits so far, 3), under each metric. `moment.positions`
        continue the last note.

        With rollback the samples are noted too: the model never holds these edits again.
        """
        judged, samples = self._judge(model, requests, baseline)
        where = f"{NOTED}/{moment.view}"
        past = {metric: notes[score_key(where, metric)] for metric in metrics_in(notes, where)}
        num_past = moment.positions[0] - 1
        added = dict(notes)
        for metric in (*past, *(metric for metric in judged if metric not in past)):
            former_R3 = past.get(metric, as_rows([Tally()] * num_past))
            new_R3 = as_rows(judged.get(metric, [Tally()] * len(requests)))
            assert len(former_R3) == num_past, "a batch was not noted"
            added[score_key(where, metric)] = torch.cat([former_R3, new_R3])
        for sample in samples if moment.is_alone else ():
            for request in requests:
                rows = [row for row in sample.rows if row["request"] == request.id]
                added[f"{ROWS}/{moment.view}/{sample.name}/{request.id}"] = to_bytes(rows)
        return added

    def noted(
        self,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        notes: Mapping[str, torch.Tensor],
        moment: Moment,
        *,
        timing: str,
    ) -> list[Measurement | Samples]:
        judged = self._ordered(noted_scores(notes, moment))
        before = self._ordered(scores_before(requests, baseline))
        parts = (
            breakdown.everything(judged, self._statistics),
            breakdown.succeeded(judged, self._statistics),
            breakdown.known_before(judged, before, self._statistics),
        )
        results: list[Measurement | Samples] = [
            measurement for part in parts for measurement in self._measurements(part, timing=timing)
        ]
        for name in map(samples_name, self.protocols):
            keys = (f"{ROWS}/{moment.view}/{name}/{request.id}" for request in requests)
            rows = tuple(row for key in keys if key in notes for row in from_bytes(notes[key]))
            if rows:
                results.append(Samples(name=name, rows=rows))
        return results

    def _samples_before(
        self, requests: Sequence[EditRequest], baseline: Mapping[str, torch.Tensor]
    ) -> Sequence[Samples]:
        batch, frozen = self._questions(requests), self._frozen(requests, baseline)
        verdicts = {
            protocol.name: protocol.assess_before(batch, frozen[protocol.name])
            for protocol in self._chosen()
        }
        return samples_of({name: own for name, own in verdicts.items() if own is not None})

    def _judge(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
    ) -> tuple[Judged, Sequence[Samples]]:
        batch, frozen = self._questions(requests), self._frozen(requests, baseline)
        return self._assess(batch, self._answers(model, batch, frozen), frozen)

    def _assess(
        self,
        batch: Sequence[Questions],
        answers: Mapping[str, Answers],
        frozen: Mapping[str, Sequence[Frozen]],
    ) -> tuple[Judged, Sequence[Samples]]:
        verdicts = {
            protocol.name: protocol.assess(batch, answers[protocol.name], frozen[protocol.name])
            for protocol in self._chosen()
        }
        judged = {
            metric: tallies for own in verdicts.values() for metric, tallies in own.judged.items()
        }
        return self._ordered(judged), samples_of(verdicts)

    def _answers(
        self,
        model: EditableModel,
        batch: Sequence[Questions],
        frozen: Mapping[str, Sequence[Frozen]] | None,
    ) -> dict[str, Answers]:
        budget = self.tokens_per_batch
        return ask_all(model, self._chosen(), batch, frozen, tokens_per_batch=budget)

    def probes(self, requests: Sequence[EditRequest]) -> Iterator[Iterator[Probe]]:
        """The answers of each request that are scored, possibly more than once."""
        yield from map(self._probes, self._questions(requests))

    def _probes(self, questions: Questions) -> Iterator[Probe]:
        for protocol in self._chosen():
            yield from protocol.probes(questions)

    def _questions(self, requests: Sequence[EditRequest]) -> list[Questions]:
        return [
            Questions(
                in_context(request, self.context),
                with_attributes=self.attribute_prompts,
                with_specificity=self.specificity,
            )
            for request in requests
        ]

    def _frozen(
        self, requests: Sequence[EditRequest], baseline: Mapping[str, torch.Tensor]
    ) -> dict[str, list[Frozen]]:
        return {
            protocol.name: [
                {
                    name: baseline[key]
                    for name in protocol.frozen
                    if (key := frozen_key(protocol, name, request)) in baseline
                }
                for request in requests
            ]
            for protocol in self._chosen()
        }

    def _ordered(self, judged: Judged) -> Judged:
        """Protocols as chosen, headlines first. Records must not depend on the order of tensors,
        which a checkpoint does not keep.
        """

        def place(metric: Metric) -> tuple[int, int, str, str]:
            family = next(
                (
                    index
                    for index, name in enumerate(breakdown.HEADLINES)
                    if metric.name.startswith(name)
                ),
                len(judged),
            )
            return self.protocols.index(metric.protocol), family, metric.name, metric.task or ""

        return {metric: judged[metric] for metric in sorted(judged, key=place)}

    def _known(self) -> tuple[AbstractProtocol, ...]:
        shipped = (Probability(), Argmax(), Token(), self.generate, self.distribution)
        return (*shipped, *self.own)

    def _chosen(self) -> list[AbstractProtocol]:
        known = {protocol.name: protocol for protocol in self._known()}
        return [known[name] for name in dict.fromkeys(self.protocols)]

    @property
    def _statistics(self) -> Statistics:
        return Statistics(aggregation=self.aggregation, resamples=self.bootstrap)

    def _measurements(
        self, results: Iterator[breakdown.SubsetEstimate], *, timing: str | None = None
    ) -> Iterator[Measurement]:
        protocols = {protocol.name: protocol for protocol in self._chosen()}
        for result in results:
            estimate, protocol = result.estimate, protocols[result.metric.protocol]
            yield Measurement(
                kind="editing",
                protocol=protocol.name,
                metric=result.metric.name,
                task=result.metric.task,
                value=estimate.value,
                stderr=estimate.stderr,
                n=estimate.n,
                nonfinite=estimate.nonfinite,
                low=estimate.low,
                high=estimate.high,
                timing=timing,
                block=result.block,
                subset=result.subset,
                aggregation=self.aggregation,
                context=self.context,
                max_new_tokens=protocol.decoding.max_new_tokens if protocol.decoding else None,
                variant=protocol.variant(result.metric.name),
            )


def probes_of(request: EditRequest, protocols: Sequence[str]) -> Iterator[Probe]:
    """The answers of a request that are scored, possibly more than once."""
    evaluator = EditingEvaluator(protocols=tuple(protocols), tokens_per_batch=1)
    (probes,) = evaluator.probes([request])
    yield from probes
