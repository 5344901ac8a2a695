"""The interface of protocols. A protocol turns a model's answers into metrics of edits.

The needs of all protocols are collected and answered in one pass; each protocol then assesses the
answers. Metrics have the same names under every protocol; records name the protocol.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from editkit.errors import message
from editkit.evaluation.scoring.teacher_forcing import DistributionRequest, Score
from editkit.evaluation.statistics.tally import Metric, Outcome, Tally, tally
from editkit.model.tokens import PLACE
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from editkit.lazy import torch

SHIPPED = ("probability", "argmax", "token", "generate", "distribution")
OUT_OF_DISTRIBUTION = "out_of_distribution"
NEIGHBOURS = "neighbours"
Frozen = Mapping[str, "torch.Tensor"]  # what a protocol froze of one request, by name
Kind = tuple[str, str | None]  # a metric and a kind of its prompts; None: all kinds together


@dataclass(frozen=True)
class Questions:
    """The prompts of one request, by metric and kind."""

    request: EditRequest
    with_attributes: bool
    with_specificity: bool = False

    @cached_property
    def expected(self) -> dict[Kind, tuple[Probe, ...]]:
        """The prompts with the answers that the edited model should give."""
        request = self.request
        probes: dict[Kind, tuple[Probe, ...]] = {
            ("efficacy", None): (request.probe(),),
            ("generalization", None): tuple(
                request.probe(prompt=prompt) for prompt in request.paraphrases
            ),
            ("portability", None): tuple(itertools.chain(*request.portability.values())),
        }
        probes |= {("portability", kind): of_kind for kind, of_kind in request.portability.items()}
        probes["hop", None] = request.hops
        if self.with_attributes:
            probes["attribute", None] = request.attribute_prompts
        if self.with_specificity:  # the same prompts as locality's, judged by their own answers
            probes |= {
                (metric.replace("locality", "specificity"), kind): of_kind
                for (metric, kind), of_kind in self.unchanged.items()
            }
        return {kind: of_kind for kind, of_kind in probes.items() if of_kind}

    @cached_property
    def unchanged(self) -> dict[Kind, tuple[Probe, ...]]:
        """The prompts whose answers must stay (locality). The out-of-distribution kind has a metric
        of its own.
        """
        kinds = {NEIGHBOURS: self.request.neighbours, **self.request.locality}
        inside = {kind: probes for kind, probes in kinds.items() if kind != OUT_OF_DISTRIBUTION}
        probes: dict[Kind, tuple[Probe, ...]] = {
            ("locality", None): tuple(itertools.chain(*inside.values()))
        }
        probes |= {("locality", kind): of_kind for kind, of_kind in inside.items()}
        probes[f"locality_{OUT_OF_DISTRIBUTION}", None] = kinds.get(OUT_OF_DISTRIBUTION, ())
        return {kind: of_kind for kind, of_kind in probes.items() if of_kind}

    @cached_property
    def unchanged_probes(self) -> tuple[Probe, ...]:
        """The different probes of `unchanged`, in the order in which protocols freeze them."""
        return tuple(dict.fromkeys(itertools.chain(*self.unchanged.values())))


@dataclass(frozen=True)
class Answers:
    """A model's answers to everything that a protocol needs."""

    scores: Mapping[Probe, Score]
    texts: Mapping[str, str]  # greedy continuations, by what `prompts` of the protocol returned


@dataclass(frozen=True)
class Verdicts:
    """The result of a protocol: a tally for each request under each metric, and rows of samples."""

    judged: Mapping[Metric, Sequence[Tally]]
    rows: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How a protocol's prompts are continued: greedily, up to a cap."""

    max_new_tokens: int
    until: tuple[str, ...]  # texts that end a generation and are not part of it


class AbstractProtocol(abc.ABC):
    """One way of judging edits. Concrete protocols are frozen dataclasses: their fields are the
    options. Only `assess` has to be written, and `probes` or `prompts`.

    A protocol of one's own is a class and a file `conf/protocol/<name>.yaml`:

        # @package evaluation.<name>
        _target_: module.Class

    chosen by `+protocol=<name> evaluation.protocols=[probability,<name>]`.
    """

    name: ClassVar[str]  # in records and in `evaluation.protocols`
    # The names of the tensors that `freeze` returns. A run's state keeps them for each request,
    # under the name of the protocol.
    frozen: ClassVar[tuple[str, ...]] = ()

    @property
    def decoding(self) -> Decoding | None:
        """How `prompts` are continued; None if there are none."""
        return None

    def probes(self, questions: Questions) -> Iterable[Probe]:
        """The answers to score, possibly more than once."""
        return ()

    def prompts(self, questions: Questions) -> Iterable[str]:
        """The texts to continue freely, possibly more than once: `lead_of` of the probes."""
        return ()

    def distributions(
        self, batch: Sequence[Questions], frozen: Sequence[Frozen] | None
    ) -> DistributionRequest | None:
        """The probes, among its own, whose next-token distributions are needed.

        Args:
            frozen: by request, as `freeze` returned it; None for the unedited model.
        """
        return None

    def freeze(self, questions: Questions, answers: Answers) -> Frozen:
        """What the protocol keeps of the unedited model's answers, under the names in `frozen`."""
        return {}

    @abc.abstractmethod
    def assess(
        self, batch: Sequence[Questions], answers: Answers, frozen: Sequence[Frozen]
    ) -> Verdicts:
        """The verdicts, from the answers and those of the unedited model."""

    def assess_before(
        self, batch: Sequence[Questions], frozen: Sequence[Frozen]
    ) -> Verdicts | None:
        """The unedited model's verdicts with their samples, from what was frozen; None if the
        protocol has no samples.
        """
        return None

    def variant(self, metric: str) -> str | None:
        """How a metric's numbers differ from what its name says, for the records."""
        return None


def unknown_protocols(names: Sequence[object], own: Iterable[AbstractProtocol] = ()) -> list[str]:
    """Problems of the names that no protocol has, as of an OptionError."""
    known = [*SHIPPED, *(protocol.name for protocol in own)]
    expected = f"one of {', '.join(known)}"
    return [
        message(f"protocols.{place}", "invalid value", got=name, expected=expected)
        for place, name in enumerate(names)
        if name not in known
    ]


def frozen_key(protocol: AbstractProtocol, name: str, request: EditRequest) -> str:
    """The key of a frozen tensor in a baseline. Shipped protocols have no prefix, as in earlier
    checkpoints: `argmax` and `token` share their greedy tokens.
    """
    prefix = "" if protocol.name in SHIPPED else f"{protocol.name}:"
    return f"{prefix}{name}/{request.id}"


def in_context(request: EditRequest, context: str) -> EditRequest:
    """The request with every prompt put into the context's "{}"."""
    if context == PLACE:
        return request

    def put(prompt: str) -> str:
        # What a prompt ends in is for what follows it.
        return context.replace(PLACE, prompt if context.endswith(PLACE) else prompt.rstrip())

    def put_all(probes: Iterable[Probe]) -> tuple[Probe, ...]:
        return tuple(replace(probe, prompt=put(probe.prompt)) for probe in probes)

    return replace(
        request,
        prompt=put(request.prompt),
        paraphrases=tuple(map(put, request.paraphrases)),
        neighbours=put_all(request.neighbours),
        locality={kind: put_all(probes) for kind, probes in request.locality.items()},
        portability={kind: put_all(probes) for kind, probes in request.portability.items()},
        attribute_prompts=put_all(request.attribute_prompts),
        hops=put_all(request.hops),
    )


def tallies(
    protocol: str, outcomes_of: Iterable[Mapping[Kind, Sequence[Outcome]]]
) -> dict[Metric, list[Tally]]:
    """From the outcomes of each request to a tally for each request, under each metric that any of
    them has.
    """
    by_request = list(outcomes_of)
    kinds = list(dict.fromkeys(kind for outcomes in by_request for kind in outcomes))
    nothing = Tally()
    return {
        Metric(protocol, *kind): [
            tally(outcomes[kind]) if outcomes.get(kind) else nothing for outcomes in by_request
        ]
        for kind in kinds
    }


def pieces(values: Sequence[Any], sizes: Iterable[int]) -> Iterator[Sequence[Any]]:
    """Consecutive parts of these sizes, which add up to the number of values."""
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size
    assert start == len(values), "the baseline belongs to other prompts or to another tokenizer"
