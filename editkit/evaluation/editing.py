"""How well edits took, held, and left alone what they should: one pass of the model for all
protocols, and what they make of it.

A request's score is the mean over its prompts, a metric the mean over requests (or over prompts,
`aggregation`). A metric for which no request has a prompt is left out. Beside the metrics over all
requests there are, marked as such:

blocks            the same for blocks of consecutive edits: how each holds while others follow (D4S, arXiv 2410.02433, Figures 4 and 8)
succeeded         locality on the requests whose edit took by the same protocol: doing nothing leaves all as it was, and is no merit
known_before      the metrics on requests that the unedited model passed already, and unknown_before on the others
immediate         the scores right after each request's own edit
forgetting        in the metric's name: the mean of what each request has lost since then

What the unedited model answers is frozen at step 0, and its scores with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, get_args

from editkit.errors import ConfigError
from editkit.evaluation.base import AbstractEditEvaluator, AbstractEvaluator, Moment, Samples
from editkit.evaluation.fluency import Fluency
from editkit.evaluation.perplexity import Perplexity
from editkit.evaluation.protocols.argmax import Argmax
from editkit.evaluation.protocols.base import (
    AbstractProtocol,
    Questions,
    Said,
    Verdicts,
    in_context,
)
from editkit.evaluation.protocols.distribution import Distribution
from editkit.evaluation.protocols.generate import Generate
from editkit.evaluation.protocols.probability import Probability
from editkit.evaluation.protocols.token import Token
from editkit.evaluation.scoring.frozen_text import from_bytes, to_bytes
from editkit.evaluation.scoring.greedy import continue_greedily
from editkit.evaluation.scoring.teacher_forcing import Asks, score
from editkit.evaluation.statistics import subsets as breakdown
from editkit.evaluation.statistics.tally import (
    Aggregation,
    Judged,
    Metric,
    Statistics,
    Tally,
    as_rows,
    from_rows,
)
from editkit.evaluation.thresholds import Thresholds
from editkit.lazy import torch
from editkit.model.tokens import PLACE
from editkit.types import EditRequest, Measurement, Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

Protocol = Literal["probability", "argmax", "token", "generate", "distribution"]
Timing = Literal["milestone", "immediate", "final"]
BEFORE, NOTED, ROWS, IDS = "before", "noted", "rows", "ids"


@dataclass(frozen=True, kw_only=True)
class EditingEvaluator(AbstractEditEvaluator):
    """The chosen protocols over the same answers: no prompt runs twice for two protocols."""

    protocols: tuple[Protocol, ...]
    tokens_per_batch: int
    timings: tuple[Timing, ...] = ("milestone",)
    # at a milestone; a seeded sample of the edits so far, None: all of them
    max_requests: int | None = None
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

    def __post_init__(self) -> None:
        problems = []
        for key, chosen, allowed in (
            ("protocols", self.protocols, Protocol),
            ("timings", self.timings, Timing),
        ):
            options = get_args(allowed)
            problems += [
                f"evaluation.{key}: {name!r} - allowed: {', '.join(options)}"
                for name in chosen
                if name not in options
            ]
        if self.context.count(PLACE) != 1:
            problems.append(
                f"evaluation.context: {self.context!r} was given; exactly one {PLACE}, where the "
                "prompt goes, is needed."
            )
        least = {
            "tokens_per_batch": (self.tokens_per_batch, 1),
            "max_requests": (self.max_requests, 1),
        }
        least |= {"block_size": (self.block_size, 1), "bootstrap": (self.bootstrap, 0)}
        problems += [
            f"evaluation.{key}: {value} was given; at least {limit} is needed."
            for key, (value, limit) in least.items()
            if value is not None and value < limit
        ]
        if problems:
            raise ConfigError(problems)

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
        said = self._ask(model, asked, None)
        frozen = [
            {
                name: each
                for protocol in self._chosen()
                for name, each in protocol.freeze(one, said).items()
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
            | {_key(BEFORE, metric): as_rows(each) for metric, each in judged.items()}
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
            metric: baseline[_key(f"{NOTED}/{moment.view}", metric)]
            for metric in _metrics(baseline, f"{NOTED}/{moment.view}")
        }
        num_past = moment.positions[0] - 1
        found = dict(baseline)
        for metric in (*past, *(metric for metric in judged if metric not in past)):
            former_R3 = past.get(metric, as_rows([Tally()] * num_past))
            new_R3 = as_rows(judged.get(metric, [Tally()] * len(requests)))
            assert len(former_R3) == num_past, "a batch was not noted"
            found[_key(f"{NOTED}/{moment.view}", metric)] = torch.cat([former_R3, new_R3])
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
        for name in map(_samples_name, self.protocols):
            keys = (f"{ROWS}/{moment.view}/{name}/{request.id}" for request in requests)
            if rows := tuple(
                row for key in keys if key in baseline for row in from_bytes(baseline[key])
            ):
                found.append(Samples(name=name, rows=rows))
        return found

    # What was asked before

    def _before(
        self, requests: Sequence[EditRequest], baseline: Mapping[str, torch.Tensor]
    ) -> Judged:
        rows = {identifier: row for row, identifier in enumerate(from_bytes(baseline[IDS]))}
        chosen = [rows[request.id] for request in requests]
        return self._ordered(
            {
                metric: from_rows(baseline[_key(BEFORE, metric)][chosen])
                for metric in _metrics(baseline, BEFORE)
            }
        )

    def _noted(self, baseline: Mapping[str, torch.Tensor], moment: Moment) -> Judged:
        chosen = [position - 1 for position in moment.positions]
        where = f"{NOTED}/{moment.view}"
        return self._ordered(
            {
                metric: from_rows(baseline[_key(where, metric)][chosen])
                for metric in _metrics(baseline, where)
            }
        )

    def _samples_before(
        self, requests: Sequence[EditRequest], baseline: Mapping[str, torch.Tensor]
    ) -> Sequence[Samples]:
        if "generate" not in self.protocols:
            return ()
        asked, frozen = self._questions(requests), self._frozen(requests, baseline)
        texts = {
            text: said
            for each, one in zip(asked, frozen, strict=True)
            for text, said in self.generate.thaw(each, one).items()
        }
        return _samples({"generate": self.generate.assess(asked, Said({}, texts), frozen)})

    # Asking and judging

    def _judge(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        baseline: Mapping[str, torch.Tensor],
    ) -> tuple[Judged, Sequence[Samples]]:
        asked, frozen = self._questions(requests), self._frozen(requests, baseline)
        return self._assess(asked, self._ask(model, asked, frozen), frozen)

    def _assess(
        self, asked: Sequence[Questions], said: Said, frozen: Sequence[Mapping[str, torch.Tensor]]
    ) -> tuple[Judged, Sequence[Samples]]:
        verdicts = {
            protocol.name: protocol.assess(asked, said, frozen) for protocol in self._chosen()
        }
        return self._ordered(
            {metric: found for each in verdicts.values() for metric, found in each.judged.items()}
        ), _samples(verdicts)

    def _ask(
        self,
        model: EditableModel,
        asked: Sequence[Questions],
        frozen: Sequence[Mapping[str, torch.Tensor]] | None,
    ) -> Said:
        chosen = self._chosen()
        probes = [probe for each in asked for probe in self._probes(each)]
        prompts = [
            prompt for each in asked for protocol in chosen for prompt in protocol.prompts(each)
        ]
        asks: Asks | None = next(
            (
                found
                for protocol in chosen
                if (found := protocol.closer_look(asked, frozen)) is not None
            ),
            None,
        )
        scores = score(model, probes, tokens_per_batch=self.tokens_per_batch, asks=asks)
        cap, until = self.generate.max_new_tokens, self.generate.until
        texts = continue_greedily(
            model, prompts, max_new_tokens=cap, until=until, tokens_per_batch=self.tokens_per_batch
        )
        return Said(scores, texts)

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
        names = ("greedy", "texts", "top", "log_probs", "sizes")
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

    def _chosen(self) -> list[AbstractProtocol]:
        known: tuple[AbstractProtocol, ...] = (
            Probability(),
            Argmax(),
            Token(),
            self.generate,
            self.distribution,
        )
        return [
            next(protocol for protocol in known if protocol.name == name)
            for name in dict.fromkeys(self.protocols)
        ]

    # Saying

    @property
    def _statistics(self) -> Statistics:
        return Statistics(aggregation=self.aggregation, resamples=self.bootstrap)

    def _measurements(
        self, found: Iterator[breakdown.Found], *, timing: str | None = None
    ) -> Iterator[Measurement]:
        protocols = {each.name: each for each in self._chosen()}
        for each in found:
            estimate = each.estimate
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
                max_new_tokens=self.generate.max_new_tokens
                if each.metric.protocol == "generate"
                else None,
                variant=protocols[each.metric.protocol].variant(each.metric.name),
            )


def probes_of(request: EditRequest, protocols: Sequence[Protocol]) -> Iterator[Probe]:
    """All that must be scored for a request, possibly more than once."""
    (found,) = EditingEvaluator(protocols=tuple(protocols), tokens_per_batch=1).probes([request])
    yield from found


def _samples(verdicts: Mapping[str, Verdicts]) -> tuple[Samples, ...]:
    return tuple(
        Samples(name=_samples_name(name), rows=each.rows)
        for name, each in verdicts.items()
        if each.rows
    )


def _samples_name(protocol: str) -> str:
    return f"editing-{protocol}"


def _key(where: str, metric: Metric) -> str:
    return f"{where}/{metric.protocol}/{metric.name}/{metric.task or ''}"


def _metrics(baseline: Mapping[str, torch.Tensor], where: str) -> list[Metric]:
    """The metrics that the baseline has scores of; a request's own tensors are found under other
    names.
    """
    names = [
        key.removeprefix(f"{where}/").split("/", 2)
        for key in baseline
        if key.startswith(f"{where}/")
    ]
    return [Metric(protocol, name, task or None) for protocol, name, task in names]
