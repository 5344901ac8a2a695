"""PRUNE's Figure 5: the values of the first edits on their two principal components, right after
each edit and after all later edits.

`suite=values` writes them into a run's samples. Shape letters: N requests, O the value's width, P
points of all clouds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editkit.records.samples import read_samples
from editkit.report.compare.subjects import Measured
from editkit.report.escape import escape_label
from editkit.report.figures.axes import UNRESTRAINED_COLOUR, colours, legend
from editkit.report.figures.panels import label_of
from editkit.report.tables import edits_by_step

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAMPLES = "values"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cloud:
    """The values of the facts at one time, on the two components."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scatter:
    """One trajectory. All clouds have the same components. `explained` is the share of the variance
    of each component, in [0, 1].
    """

    name: str
    title: str
    clouds: tuple[Cloud, ...]
    explained: tuple[float, float]


def scatters(subjects: Sequence[Measured]) -> tuple[Scatter, ...]:
    """A scatter for each trajectory whose run has values. It shows the last milestone of the first
    seed.
    """
    by_subject: dict[str, Scatter] = {}
    for run_view in sorted(subjects, key=lambda run_view: run_view.seed):
        if (
            run_view.is_trajectory
            and run_view.subject not in by_subject
            and (scatter := _scatter(run_view, subjects))
        ):
            by_subject[run_view.subject] = scatter
    return tuple(by_subject.values())


def _scatter(run_view: Measured, subjects: Sequence[Measured]) -> Scatter | None:
    import numpy as np

    records = list(read_samples(run_view.run, name=SAMPLES))
    last = max((record.step for record in records), default=0)
    by_view = {record.view: record.rows for record in records if record.step == last}
    rows = by_view.get(run_view.view, ())
    complete = [
        row
        for row in rows
        if row.get("current") and row.get("now") and None not in [*row["current"], *row["now"]]
    ]
    if len(complete) < 3:
        return None
    edits = edits_by_step(run_view.run.steps).get(last, last)
    requests = [row["request"] for row in complete]
    sets: dict[str, Any] = {
        "right after its own edit": [row["current"] for row in complete],
        f"after {edits} edits": [row["now"] for row in complete],
    }
    for view, others in by_view.items():
        known = {row["request"]: row["now"] for row in others}
        if view != run_view.view and all(
            request in known and None not in known[request] for request in requests
        ):
            sets[f"after {edits} edits, {view}"] = [known[request] for request in requests]
    points_PO = np.concatenate([np.asarray(values, dtype=float) for values in sets.values()])
    centred_PO = points_PO - points_PO.mean(axis=0)
    _, s_K, v_KO = np.linalg.svd(centred_PO, full_matrices=False)
    projected_P2 = centred_PO @ v_KO[:2].T
    shares = s_K**2 / np.sum(s_K**2)
    clouds = []
    for place, label in enumerate(sets):
        part = projected_P2[place * len(complete) : (place + 1) * len(complete)]
        clouds.append(
            Cloud(label=label, x=tuple(map(float, part[:, 0])), y=tuple(map(float, part[:, 1])))
        )
    return Scatter(
        name=f"values_{run_view.subject}",
        title=f"{run_view.model}, {label_of(run_view, subjects)}: values of the first "
        f"{len(complete)} edits (PRUNE, Figure 5)",
        clouds=tuple(clouds),
        explained=(float(shares[0]), float(shares[1])),
    )


def draw_interactive(scatter: Scatter) -> str:
    """Drawn by plotly, as a fragment for the page."""
    import plotly.graph_objects as go

    from editkit.report.figures.curves import fragment

    figure = go.Figure()
    for cloud, colour in zip(scatter.clouds, _colours(scatter), strict=True):
        figure.add_trace(
            go.Scatter(
                x=cloud.x,
                y=cloud.y,
                name=escape_label(cloud.label),
                mode="markers",
                marker={"color": colour, "size": 7, "opacity": 0.7},
            )
        )
    first, second = _axis_titles(scatter)
    figure.update_layout(
        height=480,
        template="plotly_white",
        xaxis_title=first,
        yaxis_title=second,
        legend={"orientation": "h", "y": -0.2},
    )
    return fragment(figure, scatter.name)


def draw(scatter: Scatter) -> Figure:
    """Drawn by matplotlib, for print."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axis = figure.add_subplot()
    for cloud, colour in zip(scatter.clouds, _colours(scatter), strict=True):
        axis.scatter(
            cloud.x, cloud.y, s=14, alpha=0.7, color=colour, label=cloud.label, linewidths=0
        )
    first, second = _axis_titles(scatter)
    axis.set_xlabel(first, fontsize=9)
    axis.set_ylabel(second, fontsize=9)
    axis.tick_params(labelsize=8)
    legend(figure, [axis])
    return figure


def _axis_titles(scatter: Scatter) -> list[str]:
    return [
        f"component {place} ({100 * share:.0f} % of the variance)"
        for place, share in enumerate(scatter.explained, start=1)
    ]


def _colours(scatter: Scatter) -> list[str]:
    """The colours of the clouds: right after the edits, after all edits (the colour of the
    unrestrained model), and of the restrained views.
    """
    palette = colours(len(scatter.clouds))
    return [palette[0], UNRESTRAINED_COLOUR, *palette[1:]][: len(scatter.clouds)]
