"""D4S's Figure 5a (arXiv 2410.23843): the probability of each edit's target, by the edit's place.

`suite=target_probability` writes the numbers into a run's samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from editkit.records.samples import read_samples
from editkit.report.compare.subjects import Measured
from editkit.report.figures.panels import Panel, Sheet, lines_of

SAMPLES = "target_probability"
# By the key of a row: the panel's title.
TITLES = {
    "after_edit": "P(target) right after its own edit",
    "now": "P(target) at the last milestone",
}


def target_probabilities(subjects: Sequence[Measured]) -> Iterator[Sheet]:
    """A sheet for each dataset whose runs have the samples."""
    datasets = list(dict.fromkeys(run_view.dataset for run_view in subjects))
    for dataset in datasets:
        of_dataset = [run_view for run_view in subjects if run_view.dataset == dataset]
        points: dict[str, dict[int, dict[int, float]]] = {key: {} for key in TITLES}
        for run_view in of_dataset:
            for key, values in _by_position(run_view).items():
                points[key][id(run_view)] = values
        panels = tuple(
            Panel(title=title, is_log=False, is_fraction=True, lines=lines)
            for key, title in TITLES.items()
            if (lines := lines_of(of_dataset, points[key]))
        )
        if panels:
            yield Sheet(
                name=f"{dataset}_{SAMPLES}" if len(datasets) > 1 else SAMPLES,
                title=f"{dataset}: the probability of each edit's target, by the edit's number "
                "(D4S, Figure 5a)",
                panels=panels,
            )


def _by_position(run_view: Measured) -> dict[str, dict[int, float]]:
    """The numbers of the last milestone by the edit's place; nan where one was not finite. Those
    right after an edit are left out if no edit has one.
    """
    records = [
        record
        for record in read_samples(run_view.run, name=SAMPLES)
        if record.view == run_view.view
    ]
    if not records:
        return {}
    rows = max(records, key=lambda record: record.step).rows
    return {
        key: {
            int(row["position"]): math.nan if row[key] is None else float(row[key]) for row in rows
        }
        for key in TITLES
        if any(row[key] is not None for row in rows)
    }
