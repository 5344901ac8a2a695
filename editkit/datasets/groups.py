"""Groups of requests that one batch does not hold whole.

Requests of a group are one change together, and what asks for the whole of it (multi-hop questions,
hops) hangs on its last request. With rollback a model never holds more than a batch: a group that
is cut by a batch's border is in no model as a whole, and its questions would be asked of one that
lacks a part of the chain.
"""

from __future__ import annotations

from dataclasses import replace

from editkit.datasets.base import LoadedDataset
from editkit.types import EditRequest

MULTI_HOP = "multi_hop"
LEFT_OUT = "questions about a group of requests that no batch holds whole (rollback)"


def asked_in_one_batch(data: LoadedDataset, *, batch_size: int) -> LoadedDataset:
    """The dataset without the questions about groups that are cut where a batch ends; they are
    counted among what was left out.
    """
    batches: dict[str, set[int]] = {}  # that a group's requests are in
    for place, request in enumerate(data.requests):
        if request.group is not None:
            batches.setdefault(request.group, set()).add(place // batch_size)
    cut = {group for group, found in batches.items() if len(found) > 1}
    requests = tuple(
        _without_questions(request) if request.group in cut else request
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
