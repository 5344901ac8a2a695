"""Sheets of curves drawn by plotly, for the page. The page is self-contained: plotly's script is
embedded.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from editkit.errors import ConfigError
from editkit.files import file_name
from editkit.report.escape import escape_label
from editkit.report.figures.axes import UNRESTRAINED_COLOUR, colours, num_columns
from editkit.report.figures.panels import Line, Panel, Sheet

PANEL_HEIGHT = 300  # pixels


def require_plotly() -> None:
    """Raises ConfigError without plotly."""
    if importlib.util.find_spec("plotly") is None:
        raise ConfigError("the page of editkit report needs plotly: pip install 'editkit[report]'.")


def library() -> str:
    """plotly's script, which a page embeds once."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def draw(sheet: Sheet) -> str:
    """A sheet as an HTML fragment with its data; needs `library` in the page."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    columns = sheet.columns or num_columns(len(sheet.panels))
    num_rows = -(-len(sheet.panels) // columns)
    titles = [escape_label(panel.title) for panel in sheet.panels]
    figure = make_subplots(rows=num_rows, cols=columns, subplot_titles=titles)
    styles = styles_of(sheet.panels)
    in_legend: set[str] = set()
    for place, panel in enumerate(sheet.panels):
        row, column = place // columns + 1, place % columns + 1
        for line in panel.lines:
            for trace in _traces(
                line, panel, styles[line.subject], is_first=line.subject not in in_legend
            ):
                figure.add_trace(go.Scatter(**trace), row=row, col=column)
            in_legend.add(line.subject)
        figure.update_yaxes(
            type="log" if panel.is_log else "linear",
            row=row,
            col=column,
            range=[-4, 104] if panel.is_fraction else None,
        )
        figure.update_xaxes(title_text="edits", row=row, col=column)
    figure.update_layout(
        height=num_rows * PANEL_HEIGHT + 100,
        margin={"l": 50, "r": 20, "t": 60, "b": 40},
        template="plotly_white",
        legend={"orientation": "h", "y": -0.25 / num_rows, "yanchor": "top"},
        hovermode="x",
    )
    return fragment(figure, sheet.name)


def fragment(figure: Any, name: str) -> str:
    """A plotly figure as a `div` of that id and a script, without the library."""
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{file_name(name)}",
            config={"displaylogo": False},
        )
    )


def styles_of(panels: Sequence[Panel]) -> dict[str, dict[str, str]]:
    """Colour and dash of each subject, the same in all panels. Unrestrained subjects are dashed, as
    in PRUNE's figures.
    """
    lines = {line.subject: line for panel in panels for line in panel.lines}
    restrained = [line.subject for line in lines.values() if line.is_restrained]
    unrestrained = [line.subject for line in lines.values() if not line.is_restrained]
    palette = colours(max(1, len(lines)))
    styles = {
        subject: {"color": palette[place % len(palette)], "dash": "solid"}
        for place, subject in enumerate(restrained)
    }
    for place, subject in enumerate(unrestrained):
        styles[subject] = {
            "color": UNRESTRAINED_COLOUR
            if len(unrestrained) == 1
            else palette[(len(restrained) + place) % len(palette)],
            "dash": "dash",
        }
    return styles


def _traces(
    line: Line, panel: Panel, style: dict[str, str], *, is_first: bool
) -> list[dict[str, Any]]:
    """The mean, and a band of one standard deviation if there is one."""
    scale = 100.0 if panel.is_fraction else 1.0
    common: dict[str, Any] = {"legendgroup": line.subject, "name": escape_label(line.label)}
    traces: list[dict[str, Any]] = []
    if any(high > low for low, high in zip(line.low, line.high, strict=True)):
        kept = [place for place, mean in enumerate(line.mean) if math.isfinite(mean)]
        floor = [max(line.low[place], 1e-12) if panel.is_log else line.low[place] for place in kept]
        edge = [
            *(scale * line.high[place] for place in kept),
            *(scale * low for low in reversed(floor)),
        ]
        at = [*(line.at[place] for place in kept), *(line.at[place] for place in reversed(kept))]
        band = {
            "x": at,
            "y": edge,
            "fill": "toself",
            "fillcolor": _faint(style["color"]),
            "line": {"width": 0},
            "hoverinfo": "skip",
        }
        traces.append({**common, **band, "showlegend": False, "mode": "lines"})
    has_markers = len(line.at) <= 40
    curve = {
        "x": list(line.at),
        "y": [scale * mean if math.isfinite(mean) else None for mean in line.mean],
        "mode": "lines+markers" if has_markers else "lines",
        "line": {"width": 2, **style},
        "marker": {"size": 5},
        "showlegend": is_first,
        "hovertemplate": "%{y:.4g}" + (" %" if panel.is_fraction else ""),
    }
    traces.append({**common, **curve})
    lost = [at for at, mean in zip(line.at, line.mean, strict=True) if not math.isfinite(mean)]
    if lost:  # a collapse is a result and must not look like a gap
        mark = {
            "mode": "markers",
            "marker": {"symbol": "x", "size": 8, "color": style["color"]},
            "hovertemplate": "not finite",
        }
        first_finite = next((scale * mean for mean in line.mean if math.isfinite(mean)), 1.0)
        traces.append(
            {
                **common,
                **mark,
                "x": lost[:1],
                "y": [first_finite if panel.is_log else 0.0],
                "showlegend": False,
            }
        )
    return traces


def _faint(colour: str) -> str:
    red, green, blue = (int(colour.lstrip("#")[place : place + 2], 16) for place in (0, 2, 4))
    return f"rgba({red},{green},{blue},0.15)"
