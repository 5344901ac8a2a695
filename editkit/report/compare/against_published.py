"""The papers' numbers next to the measured ones.

The runs of a preset are named after it, with `-tiny` behind where a bundled model stands in for the
paper's (`scale=tiny`); those show the effect, not the number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from editkit.report.compare.collapse import EFFICACY, collapse_points, thresholds_of
from editkit.report.compare.published import Published
from editkit.report.compare.subjects import Measured
from editkit.report.compare.summary import Mean, SummaryColumn, seconds_an_edit, text_of
from editkit.report.figures.panels import weights_by_edits
from editkit.report.tables import edits_by_step, is_summarised, number

TINY = "-tiny"  # behind the name of a preset's runs at scale=tiny
STANDS_FOR = {
    "tiny-gpt2": "gpt2",
    "tiny-gptj": "gptj",
    "tiny-llama": "llama",
}  # the bundled models' architectures
AVERAGED = ("efficacy", "generalization", "locality")  # D4S's Avg
# the metric: edits up to the last milestone before the efficacy's collapse point
EFFECTIVE = "effective_edits"
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
    def notes(self) -> tuple[str, ...]:
        """Remarks that a comparison of the two needs."""
        said = (self.published.note, self.remark if self.measured is not None else "")
        return tuple(f"{self.published.metric}: {each}" for each in said if each)


def compare_with_published(
    subjects: Sequence[Measured], published: Sequence[Published]
) -> tuple[PublishedComparison, ...]:
    """Every published number of the presets that are among the runs."""
    found = []
    for preset in dict.fromkeys(row.preset for row in published if row.preset):
        name = preset.replace("/", "-")
        runs = {each.run.config.get("experiment_name") for each in subjects}
        rows = [row for row in published if row.preset == preset]
        for given in (name, name + TINY):
            if given in runs:
                here = [
                    each for each in subjects if each.run.config.get("experiment_name") == given
                ]
                found += [
                    _comparison(row, here, rows, is_stand_in=given.endswith(TINY)) for row in rows
                ]
    return tuple(found)


def cells_of(each: PublishedComparison) -> list[str]:
    """The cells of a table's row, in the order of HEAD."""
    row, is_measured = each.published, each.measured is not None
    column = SummaryColumn(title=row.metric, is_fraction=False, better=None)
    measured = (
        _whole(each.measured)
        if row.metric == EFFECTIVE and each.measured is not None
        else text_of(each.measured, column)
    )
    edits = [
        "-" if at is None else f"{at:,}" for at in (row.edits, each.edits if is_measured else None)
    ]
    return [
        f"{row.source}, {row.table}",
        row.row,
        row.metric,
        row.model or "-",
        row.dataset or "-",
        edits[0],
        f"{row.value:,g} {row.unit}".strip(),
        each.model if is_measured else "-",
        each.dataset if is_measured else "-",
        edits[1],
        f"at least {measured}" if each.is_lower_bound else measured,
    ]


def notes_of(found: Iterable[PublishedComparison]) -> list[str]:
    """The remarks below a table of these rows, each once."""
    return list(dict.fromkeys(note for each in found for note in each.notes))


def _whole(counts: Mean) -> str:
    """Numbers of edits, over seeds."""
    return f"{counts.mean:,.0f}" + (f" ± {counts.sd:,.0f}" if counts.sd else "")


def _comparison(
    row: Published, here: Sequence[Measured], rows: Sequence[Published], *, is_stand_in: bool
) -> PublishedComparison:
    alike = [
        each
        for each in here
        if (each.editor, each.restraint) == (row.editor, row.restraint)
        and _is_model(each.model, row.model)
    ]
    if not is_stand_in:
        alike = [each for each in alike if each.dataset == row.dataset or not row.dataset]
    first = alike[:1]
    subject = first[0].subject if first else ""
    edits = _edits(row, rows, first[0], is_stand_in=is_stand_in) if first else row.edits
    if edits is None and row.edits is not None:
        alike = []
    alike = [each for each in alike if each.subject == subject]
    remark, bounds = "", [False]
    if row.metric == EFFECTIVE:
        counts = [
            count for each in alike if (count := effective_edits(each, row.protocol)) is not None
        ]
        values, bounds = [float(edits) for edits, _ in counts], [is_bound for _, is_bound in counts]
        remark = (
            f"measured is the last milestone with {EFFICACY} ({row.protocol}) of {_bound(first)} "
            "or more before the first below it"
        )
        remark += "; at least: none was below." if any(bounds) else "."
    else:
        edits = (
            edits
            if edits is not None or not first
            else max(edits_by_step(first[0].run.steps).values(), default=0)
        )
        values = [value for each in alike if (value := _value(each, row, edits)) is not None]
    scale = 100.0 if row.unit == "%" else 1.0
    return PublishedComparison(
        published=row,
        measured=Mean(values=tuple(scale * value for value in values)) if values else None,
        model=first[0].model if first else "",
        dataset=first[0].dataset if first else "",
        edits=edits,
        is_stand_in=is_stand_in,
        is_lower_bound=any(bounds),
        remark=remark,
    )


def _bound(first: Sequence[Measured]) -> str:
    return number(thresholds_of(first[0].run.config).efficacy) if first else ""


def effective_edits(each: Measured, protocol: str) -> tuple[int, bool] | None:
    """After how many edits the efficacy was last above its threshold, and whether that is only a
    lower bound: it never fell below.

    None where it was not measured.
    """
    evals = [
        record
        for record in each.run.evals
        if (record.view, record.measurement.kind, record.measurement.protocol)
        == (each.view, "editing", protocol)
    ]
    point = next(
        collapse_points(evals, edits_by_step(each.run.steps), thresholds_of(each.run.config)), None
    )
    return None if point is None else (point.sound_at or 0, point.edits is None)


def _is_model(name: str, published: str) -> bool:
    family = STANDS_FOR.get(name)
    return (
        name == published or not published or (family is not None and published.startswith(family))
    )


def _edits(
    row: Published, rows: Sequence[Published], each: Measured, *, is_stand_in: bool
) -> int | None:
    """Where to look: at the published number of edits or within 1 % of it; a stand-in's at the
    milestone of the same place, or its last.
    """
    milestones: set[int] = {*(each.run.config.get("milestones") or ())}
    measured = sorted(edits for edits in milestones if edits)
    if not row.edits or row.edits in measured:
        return row.edits
    near = [edits for edits in measured if abs(edits - row.edits) <= 0.01 * row.edits]
    if near or not is_stand_in:
        return near[0] if near else None
    published = sorted({other.edits for other in rows if other.edits})
    if len(measured) == len(published):
        return measured[published.index(row.edits)]
    return measured[-1] if measured and row.edits == published[-1] else None


def _value(each: Measured, row: Published, at: int | None) -> float | None:
    """What one run gives for a published number; fractions as fractions, nan where it was not
    finite.
    """
    steps = edits_by_step(each.run.steps)
    if at is None:
        return None
    if row.metric == "seconds":
        return seconds_an_edit(each, at, steps)
    if row.metric == "total_sigma_max":
        return weights_by_edits(each, row.metric, max).get(at)
    if row.metric == "l1_growth":
        norms = weights_by_edits(each, "l1_norm", sum)
        return norms[at] / norms[0] - 1 if at in norms and 0 in norms else None
    found: dict[str, float] = {}
    for record in each.run.evals:
        if (
            record.view == each.view
            and is_summarised(record)
            and steps.get(record.step, record.step) == at
        ):
            if record.measurement.kind == "editing" and row.protocol not in (
                "",
                record.measurement.protocol,
            ):
                continue
            name = (
                record.measurement.metric
                if record.measurement.kind == "editing"
                else str(record.measurement.task)
            )
            found.setdefault(
                name, math.nan if record.measurement.value is None else record.measurement.value
            )
    if row.metric == "average":
        return (
            sum(found[name] for name in AVERAGED) / len(AVERAGED)
            if all(name in found for name in AVERAGED)
            else None
        )
    return found.get(row.metric)
