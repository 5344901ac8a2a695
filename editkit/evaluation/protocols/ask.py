"""The model's answers for several protocols at once: what two of them need is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from editkit.evaluation.base import Samples
from editkit.evaluation.protocols.base import (
    AbstractProtocol,
    Decoding,
    Frozen,
    Questions,
    Said,
    Verdicts,
)
from editkit.evaluation.scoring.greedy import continue_greedily
from editkit.evaluation.scoring.teacher_forcing import score

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


def ask_all(
    model: EditableModel,
    chosen: Sequence[AbstractProtocol],
    asked: Sequence[Questions],
    frozen: Sequence[Frozen] | None,
    *,
    tokens_per_batch: int,
) -> dict[str, Said]:
    """The model's answers by protocol.

    One pass scores the probes of all protocols. It also yields the distributions of the first
    protocol that needs some; each further one has a pass of its own, as it may need others at the
    same probes. Prompts that are decoded alike are continued together.

    Args:
        frozen: by request, what the protocols froze; None for the unedited model.
    """
    looks = {
        protocol.name: look
        for protocol in chosen
        if (look := protocol.closer_look(asked, frozen)) is not None
    }
    first = next(iter(looks), None)
    probes = [probe for each in asked for protocol in chosen for probe in protocol.probes(each)]
    budget = tokens_per_batch
    scores = score(
        model, probes, tokens_per_batch=budget, asks=None if first is None else looks[first]
    )
    further = {
        name: scores | score(model, list(look.probes), tokens_per_batch=budget, asks=look)
        for name, look in looks.items()
        if name != first
    }
    texts: dict[Decoding, dict[str, str]] = {}
    for decoding in dict.fromkeys(each.decoding for each in chosen if each.decoding):
        prompts = [
            prompt
            for each in asked
            for protocol in chosen
            if protocol.decoding == decoding
            for prompt in protocol.prompts(each)
        ]
        texts[decoding] = continue_greedily(
            model,
            prompts,
            max_new_tokens=decoding.max_new_tokens,
            until=decoding.until,
            tokens_per_batch=budget,
        )
    return {
        each.name: Said(
            further.get(each.name, scores), texts[each.decoding] if each.decoding else {}
        )
        for each in chosen
    }


def samples_of(verdicts: Mapping[str, Verdicts]) -> tuple[Samples, ...]:
    return tuple(
        Samples(name=samples_name(name), rows=each.rows)
        for name, each in verdicts.items()
        if each.rows
    )


def samples_name(protocol: str) -> str:
    return f"editing-{protocol}"
