"""Targets that the protocol `generate` can never find exactly, whatever the model has learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from editkit.evaluation.protocols.generate import Generate
from editkit.model.tokens import encode_with_targets
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.evaluation.editing import EditingEvaluator
    from editkit.model.chat import ChatTemplate

SHOWN = 20  # requests that a warning names


def unmatchable(
    tokenizer: Any,
    requests: Sequence[EditRequest],
    generate: Generate,
    *,
    chat: ChatTemplate | None = None,
) -> dict[str, str]:
    """The ids of such requests, with the reason."""
    cap, reasons = generate.max_new_tokens, {}
    # No token stands for less than half a byte, so that most targets need no tokenizer.
    long = [request for request in requests if 2 * len(request.target.encode()) > cap]
    sequences = encode_with_targets(tokenizer, [request.probe() for request in long], chat=chat)
    lengths = {
        request.id: len(sequence.target_ids)
        for request, sequence in zip(long, sequences, strict=True)
    }
    for request in requests:
        ends = [text for text in generate.until if text in request.target.strip()]
        if ends:
            reasons[request.id] = f"holds {ends[0]!r}, which ends a generation"
        elif lengths.get(request.id, 0) > cap:
            reasons[request.id] = f"has {lengths[request.id]} tokens"
    return reasons


def warnings(
    tokenizer: Any,
    requests: Sequence[EditRequest],
    evaluation: EditingEvaluator,
    *,
    chat: ChatTemplate | None = None,
) -> list[str]:
    """What a run says about such requests, once; nothing where no generation is compared."""
    if Generate.name not in evaluation.protocols:
        return []
    found = unmatchable(tokenizer, requests, evaluation.generate, chat=chat)
    return [_warning(found, len(requests), evaluation.generate.max_new_tokens)] if found else []


def _warning(found: Mapping[str, str], num_requests: int, cap: int) -> str:
    named = [f"{id} {reason}" for id, reason in found.items()]
    more = [f"and {len(named) - SHOWN} more"] if len(named) > SHOWN else []
    return (
        f"{len(found)} of {num_requests} targets can never be generated exactly "
        f"(evaluation.generate: at most {cap} tokens): {'; '.join((*named[:SHOWN], *more))}"
    )
