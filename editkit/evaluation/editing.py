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

The answers of the unedited model are frozen at step 0, and its scores with them.
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
    Questions,
    Said,
    frozen_conflicts,
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
    context: str = PLACE  # what every prompt is put into
    attribute_prompts: bool = False  # ask CounterFact's, which double its prompts
    generate: Generate = field(default_factory=Generate)
    distribution: Distribution = field(default_factory=Distribution)
    fluency: Fluency = field(
        default_factory=lambda: Fluency(limit=0, max_tokens=100, top_k=5, seed=0)
    )
    perplexity: Perplexity = field(
        default_factory=lambda: Perplexity(path=None, max_tokens=None, window=512)
    )
    thresholds: Thresholds = field(default_factory=Thresholds)  # read by reports alone
    own: tuple[AbstractProtocol, ...] = ()  # protocols of the user's, besides the shipped ones

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
        problems += frozen_conflicts(self._known())
        if problems:
            raise OptionError(problems)

    def evaluators(self) -> dict[str, AbstractEvaluator]:
        """What these options ask for, by the names under which a run keeps their baselines."""
        found: dict[str, AbstractEvaluator] = {"editing": self} if self.protocols else {}
        if self.fluency.limit != 0:
            found["fluency"] = replace(self.fluency, tokens_per_batch=self.tokens_per_batch)
        if self.perplexity.path is not None:
            found["perplexity"] = replace(self.perplexity, tokens_per_batch=self.tokens_per_batch)
        return found

    # Asking

    def baseline(
        self, model: EditableModel, requests: Sequence[EditRequest]
    ) -> dict[str, torch.Tensor]:
        """What each protocol freezes of each request, the scores before the first edit, and whose
        they are.
        """
        if not self.protocols:
            return {}
        # Everything is asked, as later on: the same batches give the same bits, so that without an
        # edit locality is exactly 1.
        asked = self._questions(requests)
        said = self._answers(model, asked, None)
        frozen = [
            {
                name: each
                for protocol in self._chosen()
                for name, each in protocol.freeze(one, said[protocol.name]).items()
            }
            for one in asked
        ]
        found = {
            f"{name}/{one.request.id}": tensor
            for one, each in zip(asked, frozen, strict=True)
            for name, tensor in each.items()
        }
        judged, _ = self._assess(asked, said, frozen)
        return (
            found
            | {score_key(BEFORE, metric): as_rows(each) for metric, each in judged.items()}
            | {IDS: to_bytes([one.id for one in requests])}
        )

    def evaluate(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
    ) -> list[Measurement | Samples]:
        return self.measure(
            model, requests, baseline, Moment(view="", positions=tuple(range(1, len(requests) + 1)))
        )

    def measure(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> list[Measurement | Samples]:
        if not requests or not self.protocols:
            return []
        before = self._before(requests, baseline)
        if moment.is_before:  # asked already
            judged, samples = before, self._samples_before(requests, baseline)
        else:
            judged, samples = self._judge(model, requests, baseline)
        noted = self._noted(baseline, moment)
        found: list[Measurement | Samples] = [
            *self._measurements(breakdown.everything(judged, self._statistics)),
            *self._measurements(
                breakdown.blocks(judged, moment.positions, self.block_size, self._statistics)
            ),
        ]
        if not moment.is_before:
            found += self._measurements(breakdown.succeeded(judged, self._statistics))
            found += self._measurements(breakdown.known_before(judged, before, self._statistics))
        if noted:
            found += self._measurements(breakdown.forgetting(judged, noted, self._statistics))
            found += self._measurements(
                breakdown.everything(noted, self._statistics), timing="immediate"
            )
        return found + list(samples)

    def note(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        moment: Moment,
    ) -> dict[str, torch.Tensor]:
        """Adds a row for each request, (edits so far, 3), under each metric; `moment.positions` go
        on where the last note ended.

        Of edits that are alone in the model, which nothing will ask again, the samples are kept
        too.
        """
        judged, samples = self._judge(model, requests, baseline)
        past = {
            metric: baseline[score_key(f"{NOTED}/{moment.view}", metric)]
            for metric in metrics_in(baseline, f"{NOTED}/{moment.view}")
        }
        num_past = moment.positions[0] - 1
        found = dict(baseline)
        for metric in (*past, *(metric for metric in judged if metric not in past)):
            former_R3 = past.get(metric, as_rows([Tally()] * num_past))
            new_R3 = as_rows(judged.get(metric, [Tally()] * len(requests)))
            assert len(former_R3) == num_past, "a batch was not noted"
            found[score_key(f"{NOTED}/{moment.view}", metric)] = torch.cat([former_R3, new_R3])
        for each in samples if moment.is_alone else ():
            for request in requests:
                rows = [row for row in each.rows if row["request"] == request.id]
                found[f"{ROWS}/{moment.view}/{each.name}/{request.id}"] = to_bytes(rows)
        return found

    def noted(
        self,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
        moment: Moment,
        *,
        timing: str,
    ) -> list[Measurement | Samples]:
        judged, before = self._noted(baseline, moment), self._before(requests, baseline)
        parts = (
            breakdown.everything(judged, self._statistics),
            breakdown.succeeded(judged, self._statistics),
            breakdown.known_before(judged, before, self._statistics),
        )
        found: list[Measurement | Samples] = [
            each for part in parts for each in self._measurements(part, timing=timing)
        ]
        for name in map(samples_name, self.protocols):
            keys = (f"{ROWS}/{moment.view}/{name}/{request.id}" for request in requests)
            if rows := tuple(
                row for key in keys if key in baseline for row in from_bytes(baseline[key])
            ):
                found.append(Samples(name=name, rows=rows))
        return found

    # What was measured before

    def _before(
        self, requests: Sequence[EditRequest], baseline: Mapping[str, torch.Tensor]
    ) -> Judged:
        return self._ordered(scores_before(requests, baseline))

    def _noted(self, baseline: Mapping[str, torch.Tensor], moment: Moment) -> Judged:
        return self._ordered(noted_scores(baseline, moment))

    def _samples_before(
        self, requests: Sequence[EditRequest], baseline: Mapping[str, torch.Tensor]
    ) -> Sequence[Samples]:
        asked, frozen = self._questions(requests), self._frozen(requests, baseline)
        verdicts = {
            protocol.name: protocol.assess_before(asked, frozen) for protocol in self._chosen()
        }
        return samples_of({name: each for name, each in verdicts.items() if each is not None})

    # Asking and judging

    def _judge(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
    ) -> tuple[Judged, Sequence[Samples]]:
        asked, frozen = self._questions(requests), self._frozen(requests, baseline)
        return self._assess(asked, self._answers(model, asked, frozen), frozen)

    def _assess(
        self,
        asked: Sequence[Questions],
        said: Mapping[str, Said],
        frozen: Sequence[Mapping[str, torch.Tensor]],
    ) -> tuple[Judged, Sequence[Samples]]:
        verdicts = {
            protocol.name: protocol.assess(asked, said[protocol.name], frozen)
            for protocol in self._chosen()
        }
        return self._ordered(
            {metric: found for each in verdicts.values() for metric, found in each.judged.items()}
        ), samples_of(verdicts)

    def _answers(
        self,
        model: EditableModel,
        asked: Sequence[Questions],
        frozen: Sequence[Mapping[str, torch.Tensor]] | None,
    ) -> dict[str, Said]:
        budget = self.tokens_per_batch
        return ask_all(model, self._chosen(), asked, frozen, tokens_per_batch=budget)

    def probes(self, requests: Sequence[EditRequest]) -> Iterator[Iterator[Probe]]:
        """All that is scored of each request, possibly more than once."""
        yield from map(self._probes, self._questions(requests))

    def _probes(self, asked: Questions) -> Iterator[Probe]:
        for protocol in self._chosen():
            yield from protocol.probes(asked)

    def _questions(self, requests: Sequence[EditRequest]) -> list[Questions]:
        return [
            Questions(in_context(request, self.context), self.attribute_prompts)
            for request in requests
        ]

    def _frozen(
        self, requests: Sequence[EditRequest], baseline: Mapping[str, torch.Tensor]
    ) -> list[dict[str, torch.Tensor]]:
        names = [name for protocol in self._chosen() for name in protocol.frozen]
        return [
            {name: baseline[key] for name in names if (key := f"{name}/{request.id}") in baseline}
            for request in requests
        ]

    def _ordered(self, judged: Judged) -> Judged:
        """Protocols as chosen, headlines first. A saved state forgets the order of its tensors;
        records must not depend on it.
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

    # Saying

    @property
    def _statistics(self) -> Statistics:
        return Statistics(aggregation=self.aggregation, resamples=self.bootstrap)

    def _measurements(
        self, found: Iterator[breakdown.Found], *, timing: str | None = None
    ) -> Iterator[Measurement]:
        protocols = {protocol.name: protocol for protocol in self._chosen()}
        for each in found:
            estimate, protocol = each.estimate, protocols[each.metric.protocol]
            yield Measurement(
                kind="editing",
                protocol=each.metric.protocol,
                metric=each.metric.name,
                task=each.metric.task,
                value=estimate.value,
                stderr=estimate.stderr,
                n=estimate.n,
                nonfinite=estimate.nonfinite,
                low=estimate.low,
                high=estimate.high,
                timing=timing,
                block=each.block,
                subset=each.subset,
                aggregation=self.aggregation,
                context=self.context,
                max_new_tokens=protocol.decoding.max_new_tokens if protocol.decoding else None,
                variant=protocol.variant(each.metric.name),
            )


def probes_of(request: EditRequest, protocols: Sequence[str]) -> Iterator[Probe]:
    """All that must be scored for a request, possibly more than once."""
    (found,) = EditingEvaluator(protocols=tuple(protocols), tokens_per_batch=1).probes([request])
    yield from found
