"""A name in a report is text. Nothing in it acts in the page, in a figure or in a table."""

from __future__ import annotations

import html
import re
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Control characters but the tab and the line end, and halves of surrogate pairs.
INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with a mark for each character that cannot be shown."""
    return INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", text)


def escape(text: str) -> str:
    """For HTML, also inside of quotes."""
    return html.escape(visible(text))


def escape_label(text: str) -> str:
    """For plotly, which knows some tags and entities of HTML, and formulas in dollar signs."""
    return html.escape(visible(text), quote=False).replace("$", "&#36;")


def escape_cell(text: str) -> str:
    """For a cell of a Markdown table."""
    return html.escape(visible(" ".join(text.split())), quote=False).replace("|", "\\|")


def without_markup(figure: Figure, *, formulas: Collection[str] = ()) -> Figure:
    """The figure, in which a dollar sign begins a formula only in the texts `formulas`. Numbers on
    axes are left alone.
    """
    axes = figure.axes
    labels = [label for axis in axes for label in (axis.title, axis.xaxis.label, axis.yaxis.label)]
    labels += [text for axis in axes for text in axis.texts]
    labels += [text for legend in figure.legends for text in legend.get_texts()]
    for label in labels:
        if label.get_text() not in formulas:
            label.set_parse_math(False)
            label.set_text(visible(label.get_text()))
    return figure
