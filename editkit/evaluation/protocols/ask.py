"""The model's answers for several protocols at once. Answers that two protocols need are computed
once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from editkit.evaluation.base import Samples
from editkit.evaluation.protocols.base import (
    AbstractProtocol,
    Answers,
    Decoding,
    Frozen,
    Questions,
    Verdicts,
)
from editkit.evaluation.scoring.greedy import continue_greedily
from editkit.evaluation.scoring.teacher_forcing import DistributionRequest, score

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


def ask_all(
    model: EditableModel,
    protocols: Sequence[AbstractProtocol],
    batch: Sequence[Questions],
    frozen: Mapping[str, Sequence[Frozen]] | None,
    *,
    tokens_per_batch: int,
) -> dict[str, Answers]:
    """The model's answers by protocol.

    One pass scores the probes of all protocols. It also yields the distributions of the first
    protocol that needs some. Each further one has a pass of its own, as it may need others at the
    same probes. Prompts that are decoded alike are continued together.

    Args:
        frozen: by protocol and request; None for the unedited model.
    """
    needed: dict[str, DistributionRequest] = {}
    for protocol in protocols:
        own = None if frozen is None else frozen[protocol.name]
        if (distributions := protocol.distributions(batch, own)) is not None:
            needed[protocol.name] = distributions
    first = needed.pop(next(iter(needed), ""), None)
    probes = [
        probe
        for questions in batch
        for protocol in protocols
        for probe in protocol.probes(questions)
    ]
    budget = tokens_per_batch
    scores = score(model, probes, tokens_per_batch=budget, distributions=first)
    further = {
        name: scores | score(model, [*own.probes], tokens_per_batch=budget, distributions=own)
        for name, own in needed.items()
    }
    texts: dict[Decoding, dict[str, str]] = {}
    for decoding in dict.fromkeys(protocol.decoding for protocol in protocols if protocol.decoding):
        prompts = [
            prompt
            for questions in batch
            for protocol in protocols
            if protocol.decoding == decoding
            for prompt in protocol.prompts(questions)
        ]
        texts[decoding] = continue_greedily(
            model,
            prompts,
            max_new_tokens=decoding.max_new_tokens,
            until=decoding.until,
            tokens_per_batch=budget,
        )
    return {
        protocol.name: Answers(
            scores=further.get(protocol.name, scores),
            texts=texts[protocol.decoding] if protocol.decoding else {},
        )
        for protocol in protocols
    }


def samples_of(verdicts: Mapping[str, Verdicts]) -> tuple[Samples, ...]:
    """The samples of the protocols that have some."""
    return tuple(
        Samples(name=samples_name(protocol), rows=verdict.rows)
        for protocol, verdict in verdicts.items()
        if verdict.rows
    )


def samples_name(protocol: str) -> str:
    return f"editing-{protocol}"
