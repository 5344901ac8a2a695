"""Collapse points: after how many edits a model stopped taking edits, lost a task, or lost language.

Only milestones are measured, so a point is known to lie between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from editkit.evaluation.thresholds import Thresholds
from editkit.report.tables import is_summarised, number
from editkit.types import EvalRecord

EFFICACY = "efficacy"


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapsePoint:
    """One threshold of one view. It was crossed by `edits`, and not yet after `sound_at`; both None: never, and never sound."""

    name: str  # with the threshold: "edits until efficacy (argmax) < 0.5"
    view: str
    edits: int | None  # the first milestone beyond the threshold; None: none is
    sound_at: int | None  # the last milestone before it; None: none was

    def __str__(self) -> str:
        if self.edits is None:
            return f"{self.name}, {self.view}: more than {self.sound_at}"
        return f"{self.name}, {self.view}: {self.edits if self.sound_at is None else f'{self.sound_at} to {self.edits}'}"


def thresholds_of(config: Mapping[str, object]) -> Thresholds:
    """Those of a run's configuration; the usual ones where it has none."""
    evaluation = config.get("evaluation")
    given = evaluation.get("thresholds") if isinstance(evaluation, Mapping) else None
    return Thresholds(**given) if isinstance(given, Mapping) else Thresholds()


def collapse_points(evals: Sequence[EvalRecord], edits: Mapping[int, int], thresholds: Thresholds) -> Iterator[CollapsePoint]:
    """For each view: the efficacy of each protocol, the first metric of each task, each perplexity. A number that is not finite is beyond.

    `edits` is the number of edits at each measured step. Tasks and perplexities need the unedited model's number of the same view; a task
    of which it solves nothing has no point.
    """
    chosen = [record for record in evals if is_summarised(record)]
    series: dict[tuple[str, str, str, str, str], list[EvalRecord]] = {}
    headline: dict[tuple[str, str, str, str, str], str] = {}  # a task's first metric stands for it, as in the tables
    for record in chosen:
        if record.kind == "editing" and (record.metric != EFFICACY or record.task or record.step == 0):
            continue
        about = (record.view, record.kind, record.protocol or "", record.suite or "", record.task or "")
        if headline.setdefault(about, record.metric) == record.metric:
            series.setdefault(about, []).append(record)
    for about, records in series.items():
        found = _bound(records, thresholds)
        if found is not None:
            name, is_beyond = found
            yield _point(name, about[0], [(edits.get(record.step, record.step), is_beyond(record.value)) for record in records])


def _bound(records: Sequence[EvalRecord], thresholds: Thresholds) -> tuple[str, Callable[[float | None], bool]] | None:
    first = records[0]
    if first.kind == "editing":
        bound = thresholds.efficacy
        return f"edits until {EFFICACY} ({first.protocol}) < {number(bound)}", lambda value: value is None or value < bound
    if first.step != 0 or first.value is None or (first.kind == "downstream" and first.value == 0):
        return None
    if first.kind == "language":
        bound = thresholds.perplexity * first.value
        name = f"edits until {first.task or first.metric} perplexity > {number(thresholds.perplexity)} x unedited"
        return name, lambda value: value is None or value > bound
    bound = thresholds.task * first.value
    return f"edits until {first.task} {first.metric} < {number(thresholds.task)} x unedited", lambda value: value is None or value < bound


def _point(name: str, view: str, seen: Sequence[tuple[int, bool]]) -> CollapsePoint:
    ordered = sorted(seen)
    at = next((edits for edits, is_beyond in ordered if is_beyond), None)
    sound = [edits for edits, is_beyond in ordered if not is_beyond and (at is None or edits < at)]
    return CollapsePoint(name=name, view=view, edits=at, sound_at=sound[-1] if sound else None)
