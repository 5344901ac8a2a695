"""The common look of all matplotlib figures: panels, colours, marks, legends. pyplot and its global
state are not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from editkit.records.views import UNRESTRAINED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, legible to the colour-blind. The unrestrained model has the same
# colour in every figure.
COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
UNRESTRAINED_COLOUR = "#D55E00"
MARKERS = ("s", "^", "D", "v", "P", "X")
LOST = "not finite"
MAX_COLUMNS = 4
LEGEND_LINE = 0.22  # inches
LEGEND_LINES = 2  # every figure has room for as many


def grid(
    num_panels: int, *, width: float, height: float, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure of that many panels of `width` x `height` inches, `columns` side by side."""
    from matplotlib.figure import Figure

    columns = columns or num_columns(num_panels)
    rows = -(-num_panels // columns)
    figure = Figure(
        figsize=(columns * width, rows * height + LEGEND_LINES * LEGEND_LINE), layout="constrained"
    )
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(num_panels)]
    return figure, axes


def num_columns(num_panels: int) -> int:
    """Panels side by side: one row up to four, then rows that are nearly full."""
    if num_panels <= MAX_COLUMNS:
        return num_panels
    return 3 if num_panels % 3 == 0 or num_panels < 7 else MAX_COLUMNS


def dress(axis: Axes, *, title: str, ylabel: str) -> None:
    """Sets the labels and a light grid. The x axis counts edits."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("edits", fontsize=9)
    axis.set_ylabel(ylabel, fontsize=9)
    axis.tick_params(which="both", labelsize=8)
    axis.grid(visible=True, color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def view_style(view: str, views: Sequence[str]) -> dict[str, Any]:
    """Restrained views are solid, the unrestrained model is dashed (PRUNE, Figures 3 and 4)."""
    if view == UNRESTRAINED:
        return {"linestyle": "--", "marker": "o", "color": UNRESTRAINED_COLOUR}
    place = [other for other in views if other != UNRESTRAINED].index(view)
    return {
        "linestyle": "-",
        "marker": MARKERS[place % len(MARKERS)],
        "color": colours(place + 1)[place],
    }


def colours(count: int) -> list[str]:
    """`count` colours: of the palette, or of a sequential map if the palette has too few."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](place / (count - 1))) for place in range(count)]


def mark_lost(axis: Axes, edits: Iterable[int], *, color: str = "black") -> None:
    """Marks numbers that are not finite by a cross on the lower edge. A collapse is a result and
    must not look like a gap.
    """
    if at := list(edits):
        edge: dict[str, Any] = {
            "transform": axis.get_xaxis_transform(),
            "clip_on": False,
            "zorder": 5,
        }
        axis.plot(
            at,
            [0.0] * len(at),
            linestyle="",
            marker="x",
            markersize=5,
            color=color,
            label=LOST,
            **edge,
        )


def legend(figure: Figure, axes: Sequence[Axes], *, note: str | None = None) -> None:
    """One legend below all panels. Each entry occurs once; explanations of marks come last."""
    from matplotlib.lines import Line2D

    entries: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries.pop(LOST, None) is not None:
        entries[LOST] = Line2D([], [], linestyle="", marker="x", markersize=5, color="black")
    if note is not None:
        entries[note] = Line2D([], [], linestyle="")
    longest = max(map(len, entries), default=1)
    columns = max(1, min(len(entries), int(figure.get_figwidth() / (0.07 * longest + 0.6))))
    lines = -(-len(entries) // columns)
    figure.set_figheight(figure.get_figheight() + max(0, lines - LEGEND_LINES) * LEGEND_LINE)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        frameon=False,
        handlelength=2.6,
    )
