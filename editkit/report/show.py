"""A run's table on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from editkit.errors import ConfigError
from editkit.records.find import load
from editkit.records.reader import RunRecords
from editkit.report.compare.collapse import collapse_points, thresholds_of
from editkit.report.escape import visible
from editkit.report.notes import notes_of
from editkit.report.protocols import Comparison, compare_protocols, texts
from editkit.report.tables import (
    Table,
    caption,
    default_protocol,
    editing_protocols,
    edits_by_step,
    formatted,
    summarise,
)

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import ConsoleOptions, RenderableType
    from rich.table import Table as RichTable
    from rich.text import Text as RichText


ALL = "all"
GAP = 2  # blanks between two columns


def show(folder: Path, *, protocol: str | None = None) -> Summary:
    """The final table of a run and its collapse points, for a rich console. Of a foreign run there
    are no collapse points.

    Args:
        protocol: None is `probability` if it was measured. "all" adds a comparison of all protocols
            at the last milestone.

    Raises ConfigError for a folder that holds no run, malformed files, or a protocol that was not
    measured.
    """
    run = load(folder)
    protocols = editing_protocols(run.evals)
    if protocol not in (None, ALL, *protocols):
        raise ConfigError(
            f"{folder} has no editing metrics by the protocol '{protocol}'. Measured: "
            f"{', '.join(map(str, protocols)) or 'none'}."
        )
    table = run_table(run, protocol=None if protocol == ALL else protocol)
    edits = edits_by_step(run.steps)
    views = dict.fromkeys(row.view for row in table.rows) if protocol == ALL else ()
    comparisons = [compare_protocols(run.evals, edits, view=view) for view in views]
    points = () if run.is_foreign else collapse_points(run.evals, edits, thresholds_of(run.config))
    return Summary(
        title=f"{folder} ({run.status})",
        table=table,
        comparisons=tuple(filter(None, comparisons)),
        notes=(
            *(str(point) for point in points if point.edits is not None),
            *notes_of(run),
        ),
    )


def run_table(run: RunRecords, *, protocol: str | None = None) -> Table:
    """The summary of a run as a value. `tables.markdown` formats it for a README."""
    table = summarise(
        run.steps,
        run.evals,
        edits=edits_by_step(run.steps),
        protocol=protocol or default_protocol(run.evals),
        trajectory=run.trajectory_view if run.config else None,
        milestones=run.config.get("milestones") or (),
    )
    return replace(table, is_foreign=run.is_foreign)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A table that fits the width of the terminal, with a group of rows for each view. Columns that
    do not fit continue below; no number is cut.
    """

    title: str
    table: Table
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()

    def __rich_console__(
        self, console: RichConsole, options: ConsoleOptions
    ) -> Iterator[RenderableType]:

        if not self.table.rows:
            yield _text(f"{self.title}: no milestone was measured yet.")
            return
        texts = [formatted(self.table, row) for row in self.table.rows]
        yield _text(self.title, style="bold")
        for places in _bands(self.table, texts, width=options.max_width):
            yield _band(self.table, texts, places)
        yield _text(caption(self.table), style="italic")
        for comparison in self.comparisons:
            yield _protocol_table(comparison)
        yield from map(_text, self.notes)


def _text(content: str, *, style: str = "") -> RichText:
    """A name may hold characters that steer a terminal."""
    from rich.text import Text

    return Text(visible(content), style=style)


def _protocol_table(comparison: Comparison) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable

    rich_table = RichTable(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=_text(f"{comparison.view}, after {comparison.edits} edits, %"),
        title_justify="left",
    )
    rich_table.add_column("", min_width=20)
    for protocol in comparison.protocols:
        rich_table.add_column(_text(protocol), justify="right", min_width=6)
    for row, cells in zip(comparison.rows, texts(comparison), strict=True):
        rich_table.add_row(_text(row), *cells)
    return rich_table


def _bands(table: Table, texts: Sequence[Sequence[str]], *, width: int) -> list[list[int]]:
    """The places of the columns, in as few bands as the width allows."""
    left = (
        max(4, *(len(row.view) for row in table.rows))
        + max(5, *(len(str(row.edits)) for row in table.rows))
        + GAP
        + 2
    )
    bands: list[list[int]] = [[]]
    room = width - left
    for place, column in enumerate(table.columns):
        longest_word = max(
            map(len, column.title.split()), default=1
        )  # a title may wrap between words
        needed = max(longest_word, *(len(text[place]) for text in texts)) + GAP
        if needed > room and bands[-1]:
            bands.append([])
            room = width - left
        bands[-1].append(place)
        room -= needed
    return bands


def _band(table: Table, texts: Sequence[Sequence[str]], places: Sequence[int]) -> RichTable:
    """One band of the table: the columns at these places."""
    from rich import box
    from rich.table import Table as RichTable

    rich_table = RichTable(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, GAP // 2), collapse_padding=True
    )
    rich_table.add_column("view", no_wrap=True)
    rich_table.add_column("edits", justify="right", no_wrap=True)
    for place in places:
        longest_word = max(map(len, table.columns[place].title.split()), default=1)
        width = max(longest_word, *(len(row[place]) for row in texts))
        rich_table.add_column(_text(table.columns[place].title), justify="right", min_width=width)
    for view, group in groupby(zip(table.rows, texts, strict=True), key=lambda pair: pair[0].view):
        for place, (row, text) in enumerate(group):
            rich_table.add_row(
                _text(view if place == 0 else ""),
                str(row.edits),
                *(text[column] for column in places),
            )
        rich_table.add_section()
    return rich_table
