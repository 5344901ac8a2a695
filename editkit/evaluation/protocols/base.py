"""What a protocol is: a way of judging an edit from what the model says.

What is asked of the model is gathered from all protocols first and asked once; then each protocol
judges the answers. Metrics have the same names under every protocol, and are told apart by the
protocol's name.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from editkit.errors import message
from editkit.evaluation.scoring.teacher_forcing import Asks, Score
from editkit.evaluation.statistics.tally import Metric, Outcome, Tally, tally
from editkit.model.tokens import PLACE
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from editkit.lazy import torch

SHIPPED = ("probability", "argmax", "token", "generate", "distribution")
OUT_OF_DISTRIBUTION = "out_of_distribution"
NEIGHBOURS = "neighbours"
Frozen = Mapping[str, "torch.Tensor"]  # what a request's baseline holds, by name
Kind = tuple[str, str | None]  # a metric and a kind of its prompts; None: all kinds together


@dataclass(frozen=True)
class Questions:
    """All that can be asked about one request, by metric and kind."""

    request: EditRequest
    with_attributes: bool

    @cached_property
    def new(self) -> dict[Kind, tuple[Probe, ...]]:
        """What the edited model should say, and the unedited one need not."""
        request = self.request
        answer = Probe(prompt=request.full_prompt, answer=request.target)
        found: dict[Kind, tuple[Probe, ...]] = {
            ("efficacy", None): (answer,),
            ("generalization", None): tuple(
                Probe(prompt=prompt, answer=request.target) for prompt in request.paraphrases
            ),
            ("portability", None): tuple(
                probe for probes in request.portability.values() for probe in probes
            ),
        }
        found |= {("portability", kind): probes for kind, probes in request.portability.items()}
        found["hop", None] = request.hops
        if self.with_attributes:
            found["attribute", None] = request.attribute_prompts
        return {kind: probes for kind, probes in found.items() if probes}

    @cached_property
    def kept(self) -> dict[Kind, tuple[Probe, ...]]:
        """What must stay as the unedited model has it: in distribution all kinds but one, which is
        counted apart.
        """
        kinds = {NEIGHBOURS: self.request.neighbours, **self.request.locality}
        inside = {kind: probes for kind, probes in kinds.items() if kind != OUT_OF_DISTRIBUTION}
        found: dict[Kind, tuple[Probe, ...]] = {
            ("locality", None): tuple(probe for probes in inside.values() for probe in probes)
        }
        found |= {("locality", kind): probes for kind, probes in inside.items()}
        found[f"locality_{OUT_OF_DISTRIBUTION}", None] = kinds.get(OUT_OF_DISTRIBUTION, ())
        return {kind: probes for kind, probes in found.items() if probes}

    @cached_property
    def stays(self) -> tuple[Probe, ...]:
        """The different probes of `kept`, in the order in which a baseline holds them."""
        return tuple(dict.fromkeys(probe for probes in self.kept.values() for probe in probes))


@dataclass(frozen=True)
class Said:
    """What the model said to all that was asked."""

    scores: Mapping[Probe, Score]
    texts: Mapping[str, str]  # greedy continuations, by prompt


@dataclass(frozen=True)
class Verdicts:
    """What a protocol found: a tally for each request under each metric, and rows to look at."""

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
    # The names of the tensors that `freeze` returns, which the run's state keeps for each request.
    # A class owns its names: two protocols share a name only if they inherit it.
    frozen: ClassVar[tuple[str, ...]] = ()

    @property
    def decoding(self) -> Decoding | None:
        """How `prompts` are continued; None if there are none."""
        return None

    def probes(self, asked: Questions) -> Iterable[Probe]:
        """The answers to score, possibly more than once."""
        return ()

    def prompts(self, asked: Questions) -> Iterable[str]:
        """The prompts to continue freely, possibly more than once."""
        return ()

    def closer_look(
        self, asked: Sequence[Questions], frozen: Sequence[Frozen] | None
    ) -> Asks | None:
        """The probes, among its own, whose distributions are needed.

        Args:
            frozen: by request, as `freeze` returned it; None for the unedited model.
        """
        return None

    def freeze(self, asked: Questions, said: Said) -> Frozen:
        """What the protocol keeps of the unedited model's answers, under the names in `frozen`."""
        return {}

    @abc.abstractmethod
    def assess(self, asked: Sequence[Questions], said: Said, frozen: Sequence[Frozen]) -> Verdicts:
        """The verdicts, from the answers and those of the unedited model."""

    def assess_before(
        self, asked: Sequence[Questions], frozen: Sequence[Frozen]
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


def frozen_conflicts(protocols: Iterable[AbstractProtocol]) -> list[str]:
    """Problems of frozen names that two classes declare, as of an OptionError."""
    owners: dict[str, type] = {}
    problems = []
    for protocol in protocols:
        for name in protocol.frozen:
            kinds = reversed(type(protocol).__mro__)
            owner = next(kind for kind in kinds if name in vars(kind).get("frozen", ()))
            if owners.setdefault(name, owner) is not owner:
                problem = f"{owner.__name__} and {owners[name].__name__} both freeze {name!r}"
                problems.append(message("protocols", problem, fix="rename one of them"))
    return problems


def in_context(request: EditRequest, context: str) -> EditRequest:
    """The request with every prompt put into the context's "{}"."""
    if context == PLACE:
        return request

    def put(prompt: str) -> str:
        return context.replace(PLACE, prompt)

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
    protocol: str, found: Iterable[Mapping[Kind, Sequence[Outcome]]]
) -> dict[Metric, list[Tally]]:
    """From the outcomes of each request to a tally for each request under each metric that any of
    them has.
    """
    by_request = list(found)
    kinds = list(dict.fromkeys(kind for outcomes in by_request for kind in outcomes))
    nothing = Tally()
    return {
        Metric(protocol, *kind): [
            tally(outcomes[kind]) if outcomes.get(kind) else nothing for outcomes in by_request
        ]
        for kind in kinds
    }


def pieces(values: Sequence[Any], sizes: Iterable[int]) -> Iterator[Sequence[Any]]:
    """Consecutive parts of so many values each; they must use all of them up."""
    start = 0
    for size in sizes:
        yield values[start : start + size]
        start += size
    assert start == len(values), "the baseline belongs to other prompts or to another tokenizer"
