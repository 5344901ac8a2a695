"""Groups of requests that are split over several batches.

The requests of a group form one change. The questions about the whole change (multi-hop questions,
hops) belong to its last request. With rollback a model contains the edits of one batch only. If the
border of a batch splits a group, no model contains the whole change, and its questions would be
asked of a model that lacks a part of the chain.
"""

from __future__ import annotations

from dataclasses import replace

from editkit.datasets.base import LoadedDataset
from editkit.types import EditRequest

MULTI_HOP = "multi_hop"
LEFT_OUT = "questions about a group of requests that no batch holds whole (rollback)"


def without_split_groups(data: LoadedDataset, *, batch_size: int) -> LoadedDataset:
    """The dataset without the questions about split groups, which are counted in `left_out`."""
    batches: dict[str, set[int]] = {}  # by group, the batches of its requests
    for place, request in enumerate(data.requests):
        if request.group is not None:
            batches.setdefault(request.group, set()).add(place // batch_size)
    split = {group for group, numbers in batches.items() if len(numbers) > 1}
    requests = tuple(
        _without_questions(request) if request.group in split else request
        for request in data.requests
    )
    num_left_out = sum(
        _num_questions(before) - _num_questions(after)
        for before, after in zip(data.requests, requests, strict=True)
    )
    if not num_left_out:
        return data
    return replace(
        data,
        requests=requests,
        left_out={**data.left_out, LEFT_OUT: data.left_out.get(LEFT_OUT, 0) + num_left_out},
    )


def _without_questions(request: EditRequest) -> EditRequest:
    kept = {kind: probes for kind, probes in request.portability.items() if kind != MULTI_HOP}
    return replace(request, hops=(), portability=kept)


def _num_questions(request: EditRequest) -> int:
    return len(request.hops) + len(request.portability.get(MULTI_HOP, ()))
