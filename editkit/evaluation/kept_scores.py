"""Scores of edits in a run's state: those before the first edit in its baseline, and those right
after each edit in its notes. A state holds tensors only: scores are rows under keys that name the
metric.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from editkit.evaluation.base import Moment
from editkit.evaluation.scoring.frozen_text import from_bytes
from editkit.evaluation.statistics.tally import Judged, Metric, from_rows
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.lazy import torch

BEFORE, NOTED, ROWS, IDS = "before", "noted", "rows", "ids"


def scores_before(requests: Sequence[EditRequest], baseline: Mapping[str, torch.Tensor]) -> Judged:
    """The unedited model's scores of these requests."""
    rows = {identifier: row for row, identifier in enumerate(from_bytes(baseline[IDS]))}
    chosen = [rows[request.id] for request in requests]
    return {
        metric: from_rows(baseline[score_key(BEFORE, metric)][chosen])
        for metric in metrics_in(baseline, BEFORE)
    }


def noted_scores(notes: Mapping[str, torch.Tensor], moment: Moment) -> Judged:
    """The scores of the moment's edits right after each of them."""
    chosen = [position - 1 for position in moment.positions]
    where = f"{NOTED}/{moment.view}"
    return {
        metric: from_rows(notes[score_key(where, metric)][chosen])
        for metric in metrics_in(notes, where)
    }


def score_key(where: str, metric: Metric) -> str:
    return f"{where}/{metric.protocol}/{metric.name}/{metric.task or ''}"


def metrics_in(kept: Mapping[str, torch.Tensor], where: str) -> list[Metric]:
    """The metrics that a baseline or notes have scores of. Tensors of requests have other names."""
    names = [
        key.removeprefix(f"{where}/").split("/", 2) for key in kept if key.startswith(f"{where}/")
    ]
    return [Metric(protocol, name, task or None) for protocol, name, task in names]
