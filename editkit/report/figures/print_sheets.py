"""Sheets of curves drawn by matplotlib for print: PNG and PDF."""

from __future__ import annotations

import io
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.files import file_name, write_atomically
from editkit.report.escape import without_markup
from editkit.report.figures.axes import dress, grid, legend, mark_lost, num_columns
from editkit.report.figures.curves import styles_of
from editkit.report.figures.panels import Sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200


def draw(sheet: Sheet) -> Figure:
    """A panel for each metric, a line for each subject: the mean over seeds, with a band of one
    standard deviation.
    """
    columns = sheet.columns or num_columns(len(sheet.panels))
    figure, axes = grid(len(sheet.panels), width=2.8, height=2.6, columns=columns)
    styles = styles_of(sheet.panels)
    has_bands = False
    for place, (axis, panel) in enumerate(zip(axes, sheet.panels, strict=True)):
        scale = 100.0 if panel.is_fraction else 1.0
        axis.set_yscale("log" if panel.is_log else "linear")
        for line in panel.lines:
            style = styles[line.subject]
            marks: dict[str, Any] = {}
            if len(line.at) <= 40:
                marks = {"marker": "o", "markersize": 3.0}
            dash = "--" if style["dash"] == "dash" else "-"
            values = [scale * mean for mean in line.mean]
            axis.plot(
                line.at,
                values,
                label=textwrap.shorten(line.label, 90),
                linestyle=dash,
                color=style["color"],
                linewidth=1.3,
                **marks,
            )
            if any(high > low for low, high in zip(line.low, line.high, strict=True)):
                has_bands = True
                band = [scale * low for low in line.low], [scale * high for high in line.high]
                axis.fill_between(line.at, *band, color=style["color"], alpha=0.15, linewidth=0)
            mark_lost(
                axis,
                [
                    at
                    for at, mean in zip(line.at, line.mean, strict=True)
                    if not math.isfinite(mean)
                ][:1],
                color=style["color"],
            )
        if panel.is_fraction:
            axis.set_ylim(-4, 104)
        is_left = place % columns == 0
        dress(axis, title=panel.title, ylabel="%" if panel.is_fraction and is_left else "")
    legend(figure, axes, note="bands: one standard deviation over seeds" if has_bands else None)
    return figure


def save(figure: Figure, folder: Path, name: str) -> tuple[Path, ...]:
    """Writes `<name>.png` and `<name>.pdf`; the same figure gives the same bytes."""
    written = []
    for kind, metadata in (
        ("png", {"Software": None}),
        ("pdf", {"CreationDate": None, "Creator": None, "Producer": None}),
    ):
        buffer = io.BytesIO()
        without_markup(figure).savefig(buffer, format=kind, dpi=DPI, metadata=metadata)
        written.append(folder / f"{file_name(name)}.{kind}")
        write_atomically(written[-1], buffer.getvalue())
    return tuple(written)
