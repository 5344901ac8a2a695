"""Scores of edits in a run's state: those before the first edit, and those noted right after each
edit. A state holds tensors only, so that scores are rows under keys that name the metric.
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


def noted_scores(baseline: Mapping[str, torch.Tensor], moment: Moment) -> Judged:
    """The scores of the moment's edits that were noted right after each of them."""
    chosen = [position - 1 for position in moment.positions]
    where = f"{NOTED}/{moment.view}"
    return {
        metric: from_rows(baseline[score_key(where, metric)][chosen])
        for metric in metrics_in(baseline, where)
    }


def score_key(where: str, metric: Metric) -> str:
    return f"{where}/{metric.protocol}/{metric.name}/{metric.task or ''}"


def metrics_in(baseline: Mapping[str, torch.Tensor], where: str) -> list[Metric]:
    """The metrics that the baseline has scores of; a request's own tensors are found under other
    names.
    """
    names = [
        key.removeprefix(f"{where}/").split("/", 2)
        for key in baseline
        if key.startswith(f"{where}/")
    ]
    return [Metric(protocol, name, task or None) for protocol, name, task in names]
