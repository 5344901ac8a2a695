"""Collapse points: after how many edits a model stopped taking edits, lost a task, or lost
language.

Only milestones are measured, so a point is known to lie between two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from editkit.errors import keys_under
from editkit.evaluation.thresholds import Thresholds
from editkit.report.compare.subjects import Measured
from editkit.report.tables import edits_by_step, is_summarised, number
from editkit.types import EvalRecord

EFFICACY = "efficacy"
UNTIL = "edits until "


@dataclass(frozen=True, slots=True, kw_only=True)
class CollapsePoint:
    """One threshold of one view. It was crossed by `edits`, and not yet after `sound_at`; both
    None: never, and never sound.
    """

    name: str  # with the threshold: "edits until efficacy (argmax) < 0.5"
    view: str
    edits: int | None  # the first milestone beyond the threshold; None: none is
    sound_at: int | None  # the last milestone before it; None: none was

    @property
    def when(self) -> str:
        """`100 to 150`, `10` (the first milestone) or `more than 200`."""
        if self.edits is None:
            return f"more than {self.sound_at}"
        return str(self.edits) if self.sound_at is None else f"{self.sound_at} to {self.edits}"

    def __str__(self) -> str:
        return f"{self.name}, {self.view}: {self.when}"


def thresholds_of(config: Mapping[str, object]) -> Thresholds:
    """The thresholds of a run's configuration, or the defaults."""
    evaluation = config.get("evaluation")
    given = evaluation.get("thresholds") if isinstance(evaluation, Mapping) else None
    with keys_under("evaluation.thresholds"):
        return Thresholds(**given) if isinstance(given, Mapping) else Thresholds()


def collapse_points(
    evals: Sequence[EvalRecord], edits: Mapping[int, int], thresholds: Thresholds
) -> Iterator[CollapsePoint]:
    """For each view: the efficacy of each protocol, the first metric of each task, each perplexity.
    A number that is not finite is beyond.

    `edits` is the number of edits at each measured step. Tasks and perplexities need the unedited
    model's number of the same view; a task of which it solves nothing has no point. With rollback
    no edits add up, and there is none.
    """
    if any(record.measurement.timing == "rollback" for record in evals):
        return
    chosen = [record for record in evals if is_summarised(record)]
    series: dict[tuple[str, str, str, str, str], list[EvalRecord]] = {}
    headline: dict[
        tuple[str, str, str, str, str], str
    ] = {}  # a task's first metric stands for it, as in the tables
    for record in chosen:
        if record.measurement.kind == "editing" and (
            record.measurement.metric != EFFICACY or record.measurement.task or record.step == 0
        ):
            continue
        about = (
            record.view,
            record.measurement.kind,
            record.measurement.protocol or "",
            record.measurement.suite or "",
            record.measurement.task or "",
        )
        if headline.setdefault(about, record.measurement.metric) == record.measurement.metric:
            series.setdefault(about, []).append(record)
    for about, records in series.items():
        bound = _bound(records, thresholds)
        if bound is not None:
            name, is_beyond = bound
            yield _point(
                name,
                about[0],
                [
                    (edits.get(record.step, record.step), is_beyond(record.measurement.value))
                    for record in records
                ],
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Collapses:
    """The collapse points of the subjects of one dataset: a row for each subject, a column for each
    threshold, seed by seed in a cell.
    """

    dataset: str
    columns: tuple[str, ...]  # "efficacy (argmax) < 0.5"
    labels: tuple[tuple[str, str, str], ...]  # model, editor, restraint
    cells: tuple[
        tuple[str, ...], ...
    ]  # "100 to 150", "100 to 150; more than 200", "-" where it was not measured


def collapses(subjects: Sequence[Measured]) -> Iterator[Collapses]:
    """The tables of all datasets that have collapse points, crossed or not."""
    for dataset in dict.fromkeys(run_view.dataset for run_view in subjects):
        points: dict[str, dict[str, list[str]]] = {}
        labels: dict[str, tuple[str, str, str]] = {}
        for run_view in sorted(
            (run_view for run_view in subjects if run_view.dataset == dataset),
            key=lambda run_view: (*run_view.label[:2], run_view.is_restrained),
        ):
            evals = [record for record in run_view.run.evals if record.view == run_view.view]
            for point in collapse_points(
                evals, edits_by_step(run_view.run.steps), thresholds_of(run_view.run.config)
            ):
                labels[run_view.subject] = run_view.label
                points.setdefault(run_view.subject, {}).setdefault(
                    point.name.removeprefix(UNTIL), []
                ).append(point.when)
        columns = tuple(dict.fromkeys(name for row in points.values() for name in row))
        if columns:
            cells = tuple(
                tuple(_seed_by_seed(row.get(name, ())) for name in columns)
                for row in points.values()
            )
            yield Collapses(
                dataset=dataset, columns=columns, labels=tuple(labels.values()), cells=cells
            )


def _seed_by_seed(texts: Sequence[str]) -> str:
    """The text of each seed, or one text if all are equal."""
    return "; ".join(texts if len(set(texts)) > 1 else texts[:1]) or "-"


def _bound(
    records: Sequence[EvalRecord], thresholds: Thresholds
) -> tuple[str, Callable[[float | None], bool]] | None:
    first = records[0]
    if first.measurement.kind == "editing":
        bound = thresholds.efficacy
        return (
            f"{UNTIL}{EFFICACY} ({first.measurement.protocol}) < {number(bound)}",
            lambda value: value is None or value < bound,
        )
    if (
        first.step != 0
        or first.measurement.value is None
        or (first.measurement.kind == "downstream" and first.measurement.value == 0)
    ):
        return None
    if first.measurement.kind == "language":
        bound = thresholds.perplexity * first.measurement.value
        text = first.measurement.task or first.measurement.metric
        limit = number(thresholds.perplexity)
        name = f"{UNTIL}{text} perplexity > {limit} x unedited"
        return name, lambda value: value is None or value > bound
    bound = thresholds.task * first.measurement.value
    return (
        f"{UNTIL}{first.measurement.task} {first.measurement.metric} < {number(thresholds.task)} "
        "x unedited",
        lambda value: value is None or value < bound,
    )


def _point(name: str, view: str, seen: Sequence[tuple[int, bool]]) -> CollapsePoint:
    ordered = sorted(seen)
    at = next((edits for edits, is_beyond in ordered if is_beyond), None)
    sound = [edits for edits, is_beyond in ordered if not is_beyond and (at is None or edits < at)]
    return CollapsePoint(name=name, view=view, edits=at, sound_at=sound[-1] if sound else None)
