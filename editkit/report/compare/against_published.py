"""The papers' numbers next to the measured ones.

The runs of a preset are named after it. Where another model stands in for the paper's, the name
ends in the scale (`-tiny`); those runs show the effect, not the number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from editkit.report.compare.collapse import EFFICACY, collapse_points, thresholds_of
from editkit.report.compare.published import Published
from editkit.report.compare.subjects import Measured
from editkit.report.compare.summary import Mean, SummaryColumn, seconds_an_edit, text_of
from editkit.report.figures.panels import weights_by_edits
from editkit.report.tables import ALL_EDITS_SO_FAR, edits_by_step, number

SCALED = ("-tiny", "-small")  # behind the name of a preset's runs with scale=tiny or scale=small
# The architectures of the bundled models. Any other model stands in for every model.
STANDS_FOR = {
    "tiny-gpt2": "gpt2",
    "tiny-gptj": "gptj",
    "tiny-llama": "llama",
}
LOCALITY, LOCALITY_OUTSIDE = "locality", "locality_out_of_distribution"
AVERAGED = ("efficacy", "generalization")  # the papers' average, with the dataset's locality
# the metric: edits up to the last milestone before the efficacy's collapse point
EFFECTIVE = "effective_edits"
SCALES = {"%": 100.0, "bits x 100": 100.0}  # by unit
ONLY = "published only"
HEAD = (
    *("source", "row", "metric", "paper's model", "paper's dataset", "paper's edits", "published"),
    *("our model", "our dataset", "our edits", "measured"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedComparison:
    """A published number and the runs' number for it; `measured` is None if no run has it."""

    published: Published
    measured: Mean | None
    model: str
    dataset: str
    edits: int | None  # of the measured number; a stand-in may have other milestones
    is_stand_in: bool
    is_lower_bound: bool = False  # of what was measured
    remark: str = ""  # on how it was measured

    @property
    def is_published_only(self) -> bool:
        """Whether no run can have the number."""
        return bool(self.published.not_measured)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks that a comparison of the two needs."""
        if self.is_published_only:
            return (f"{ONLY}: {self.published.not_measured}",)
        texts = (self.published.note, self.remark if self.measured is not None else "")
        return tuple(f"{self.published.metric}: {text}" for text in texts if text)


def compare_with_published(
    subjects: Sequence[Measured], published: Sequence[Published]
) -> tuple[PublishedComparison, ...]:
    """Every published number of the presets that are among the runs."""
    by_name: dict[str, list[Measured]] = {}
    for run_view in subjects:
        by_name.setdefault(str(run_view.run.config.get("experiment_name")), []).append(run_view)
    comparisons = []
    for preset in dict.fromkeys(row.preset for row in published if row.preset):
        rows = [row for row in published if row.preset == preset]
        for suffix in ("", *SCALED):
            here = by_name.get(preset.replace("/", "-") + suffix, [])
            comparisons += [
                _comparison(row, here, rows, is_stand_in=bool(suffix)) for row in rows if here
            ]
    return tuple(comparisons)


def cells_of(comparison: PublishedComparison) -> list[str]:
    """The cells of a table's row, in the order of HEAD."""
    row, measured = comparison.published, comparison.measured
    column = SummaryColumn(title=row.metric, is_fraction=False, better=None)
    is_count = row.metric == EFFECTIVE and measured is not None
    text = _whole(measured) if is_count and measured is not None else text_of(measured, column)
    ours = (comparison.model, comparison.dataset, _count(comparison.edits))
    if comparison.is_published_only:
        text, ours = ONLY, ("", "", "")
    elif measured is None:
        ours = ("-", "-", "-")
    return [
        f"{row.source}, {row.table}",
        row.row,
        row.metric,
        row.model or "-",
        row.dataset or "-",
        _count(row.edits),
        f"{row.value:,g} {row.unit}".strip(),
        *ours,
        f"at least {text}" if comparison.is_lower_bound else text,
    ]


def notes_of(comparisons: Iterable[PublishedComparison]) -> list[str]:
    """The remarks below a table of these rows, each once."""
    comparisons = list(comparisons)
    remarks = dict.fromkeys(note for comparison in comparisons for note in comparison.notes)
    return [*_places(comparisons), *remarks]


def _places(comparisons: Iterable[PublishedComparison]) -> list[str]:
    """Which milestone of a stand-in's run is compared with which of the paper's."""
    pairs = {
        (comparison.published.edits, comparison.edits)
        for comparison in comparisons
        if comparison.is_stand_in and comparison.measured is not None
        if comparison.published.edits and comparison.edits
    }
    if all(theirs == ours for theirs, ours in pairs):
        return []
    theirs, ours = zip(*sorted(pairs), strict=True)
    return [
        "milestones are matched by their place in the run: "
        f"{', '.join(map(_count, theirs))} edits of the paper beside "
        f"{', '.join(map(_count, ours))} of ours."
    ]


def _count(edits: int | None) -> str:
    return "-" if edits is None else f"{edits:,}"


def _whole(counts: Mean) -> str:
    """Numbers of edits, over seeds."""
    return f"{counts.mean:,.0f}" + (f" ± {counts.sd:,.0f}" if counts.sd else "")


def _comparison(
    row: Published, here: Sequence[Measured], rows: Sequence[Published], *, is_stand_in: bool
) -> PublishedComparison:
    alike = (
        []
        if row.not_measured
        else [run_view for run_view in here if _is_meant(run_view, row, is_stand_in=is_stand_in)]
    )
    first = alike[0] if alike else None
    edits = row.edits if first is None else _edits(row, rows, first, is_stand_in=is_stand_in)
    if edits is None and row.edits is not None:
        alike = []
    alike = [run_view for run_view in alike if first and run_view.subject == first.subject]
    remark, is_lower_bound, values = "", False, []
    if row.metric == EFFECTIVE:
        counts = [effective_edits(run_view, row.protocol) for run_view in alike]
        values = [float(count) for count, _ in filter(None, counts)]
        is_lower_bound = any(is_bound for _, is_bound in filter(None, counts))
        remark = (
            f"measured is the last milestone with {EFFICACY} ({row.protocol}) of {_bound(first)} "
            "or more before the first below it"
        )
        remark += "; at least: none was below." if is_lower_bound else "."
    elif first is not None:
        if row.edits is None:  # the paper gives none: after the last edit
            edits = max(edits_by_step(first.run.steps).values(), default=0)
        by_seed = [numbers_at(run_view, row, edits) for run_view in alike if edits is not None]
        metric = row.metric
        if is_stand_in and metric == LOCALITY_OUTSIDE and not any(metric in own for own in by_seed):
            metric = LOCALITY
            remark = "the dataset that stands in has no such prompts; measured is its locality."
        values = [own[metric] for own in by_seed if metric in own]
    scale = SCALES.get(row.unit, 1.0)
    return PublishedComparison(
        published=row,
        measured=Mean(values=tuple(scale * value for value in values)) if values else None,
        model=first.model if first else "",
        dataset=first.dataset if first else "",
        edits=edits,
        is_stand_in=is_stand_in,
        is_lower_bound=is_lower_bound,
        remark=remark,
    )


def _is_meant(run_view: Measured, row: Published, *, is_stand_in: bool) -> bool:
    """Whether a run's number can stand beside a row's, as far as its configuration says."""
    is_model = run_view.model == row.model or not row.model
    is_dataset = run_view.dataset == row.dataset or not row.dataset
    if is_stand_in:
        is_model = is_model or row.model.startswith(STANDS_FOR.get(run_view.model, ""))
        is_dataset = True
    return (
        is_model
        and is_dataset
        and (run_view.editor, run_view.restraint) == (row.editor, row.restraint)
        and all(_value_of(run_view.run.config, key) == value for key, value in row.wanted.items())
    )


def _value_of(config: Mapping[str, Any], key: str) -> str:
    """The value of a dotted key as text; "None" where the configuration does not have it."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return str(node)


def _bound(run_view: Measured | None) -> str:
    return number(thresholds_of(run_view.run.config).efficacy) if run_view else ""


def effective_edits(run_view: Measured, protocol: str) -> tuple[int, bool] | None:
    """After how many edits the efficacy was last above its threshold, and whether that is only a
    lower bound: it never fell below.

    None where it was not measured.
    """
    evals = [
        record
        for record in run_view.run.evals
        if (record.view, record.measurement.kind, record.measurement.protocol)
        == (run_view.view, "editing", protocol)
    ]
    edits, thresholds = edits_by_step(run_view.run.steps), thresholds_of(run_view.run.config)
    point = next(collapse_points(evals, edits, thresholds), None)
    return None if point is None else (point.sound_at or 0, point.edits is None)


def _edits(
    row: Published, rows: Sequence[Published], run_view: Measured, *, is_stand_in: bool
) -> int | None:
    """The milestone to look at: the published number of edits or within 1 % of it. A stand-in's is
    that of the same place in its run, whatever its number: its i-th milestone beside the paper's
    i-th, or the last beside the last.
    """
    given: set[int] = {*(run_view.run.config.get("milestones") or ())}
    milestones = sorted(edits for edits in given if edits)
    if not row.edits:
        return row.edits
    if not is_stand_in:
        near = [edits for edits in milestones if abs(edits - row.edits) <= 0.01 * row.edits]
        return min(near, key=lambda edits: abs(edits - (row.edits or 0)), default=None)
    published = sorted({other.edits for other in rows if other.edits})
    if len(milestones) == len(published):
        return milestones[published.index(row.edits)]
    return milestones[-1] if milestones and row.edits == published[-1] else None


def numbers_at(run_view: Measured, row: Published, at: int) -> dict[str, float]:
    """What one run has after so many edits, by the metrics of published numbers, under a row's
    protocol. Fractions are fractions; nan where a number was not finite.
    """
    steps = edits_by_step(run_view.run.steps)
    numbers: dict[str, float] = {}
    for record in run_view.run.evals:
        measurement = record.measurement
        if (
            record.view != run_view.view
            or steps.get(record.step, record.step) != at
            or measurement.timing not in ALL_EDITS_SO_FAR
            or measurement.kind in ("weights", "comparison")
            or measurement.is_part
        ):
            continue
        if measurement.kind != "editing":
            name = str(measurement.task)  # a task's first metric stands for it, as in the tables
        elif measurement.task is None and row.protocol in ("", measurement.protocol):
            name = measurement.metric
        else:
            continue
        numbers.setdefault(name, math.nan if measurement.value is None else measurement.value)
    parts = [numbers.get(name) for name in AVERAGED]
    parts.append(numbers.get(LOCALITY, numbers.get(LOCALITY_OUTSIDE)))
    known = [part for part in parts if part is not None]
    if len(known) == len(parts):
        numbers["average"] = math.fsum(known) / len(known)
    if (seconds := seconds_an_edit(run_view, at, steps)) is not None:
        numbers["seconds"] = seconds
    largest = weights_by_edits(run_view, "total_sigma_max", max)
    norms = weights_by_edits(run_view, "l1_norm", sum)
    if at in largest:
        numbers["total_sigma_max"] = largest[at]
    if at in norms and 0 in norms:
        numbers["l1_growth"] = norms[at] / norms[0] - 1
    return numbers
