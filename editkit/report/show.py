"""A run's table on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from editkit.errors import ConfigError
from editkit.records.reader import RunRecords, load_run
from editkit.report.compare.collapse import collapse_points, thresholds_of
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


ALL = "all"
GAP = 2  # blanks between two columns


def show(folder: Path, *, protocol: str | None = None) -> Summary:
    """The final table of a run, from its files, to be printed by a rich console, and where it
    collapsed.

    `protocol` None: `probability` where it was measured; "all": beside it, how the last milestone
    looks under each.

    Raises ConfigError for a folder that holds no run, malformed files, or a protocol that was not
    measured.
    """
    run = load_run(folder)
    measured = editing_protocols(run.evals)
    if protocol not in (None, ALL, *measured):
        raise ConfigError(
            f"{folder} has no editing metrics by the protocol '{protocol}'. Measured: "
            f"{', '.join(map(str, measured)) or 'none'}."
        )
    table = run_table(run, protocol=None if protocol == ALL else protocol)
    edits = edits_by_step(run.steps)
    views = dict.fromkeys(row.view for row in table.rows) if protocol == ALL else ()
    compared = [compare_protocols(run.evals, edits, view=view) for view in views]
    points = collapse_points(run.evals, edits, thresholds_of(run.config))
    return Summary(
        title=f"{folder} ({run.status})",
        table=table,
        comparisons=tuple(each for each in compared if each is not None),
        notes=tuple(str(point) for point in points if point.edits is not None),
    )


def run_table(run: RunRecords, *, protocol: str | None = None) -> Table:
    """The summary of a run as a value; `tables.markdown` makes of it what a README wants."""
    return summarise(
        run.steps,
        run.evals,
        edits=edits_by_step(run.steps),
        protocol=protocol or default_protocol(run.evals),
    )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A table that fits itself to the terminal: a group of rows for each view; columns without room
    go on below, no number is cut.
    """

    title: str
    table: Table
    comparisons: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()

    def __rich_console__(
        self, console: RichConsole, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        from rich.text import Text

        if not self.table.rows:
            yield Text(f"{self.title}: no milestone was measured yet.")
            return
        texts = [formatted(self.table, row) for row in self.table.rows]
        yield Text(self.title, style="bold")
        for places in _bands(self.table, texts, width=options.max_width):
            yield _band(self.table, texts, places)
        yield Text(caption(self.table), style="italic")
        for comparison in self.comparisons:
            yield _protocol_table(comparison)
        yield from map(Text, self.notes)


def _protocol_table(comparison: Comparison) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"{comparison.view}, after {comparison.edits} edits, %",
        title_justify="left",
    )
    drawn.add_column("", min_width=20)
    for protocol in comparison.protocols:
        drawn.add_column(Text(protocol), justify="right", min_width=6)
    for row, cells in zip(comparison.rows, texts(comparison), strict=True):
        drawn.add_row(Text(row), *cells)
    return drawn


def _bands(table: Table, texts: Sequence[Sequence[str]], *, width: int) -> list[list[int]]:
    """The columns, in as few bands as fit."""
    left = (
        max(4, *(len(row.view) for row in table.rows))
        + max(5, *(len(str(row.edits)) for row in table.rows))
        + GAP
        + 2
    )
    bands: list[list[int]] = [[]]
    room = width - left
    for place, column in enumerate(table.columns):
        longest_word = max(map(len, column.title.split()))  # a title may wrap between words
        needed = max(longest_word, *(len(text[place]) for text in texts)) + GAP
        if needed > room and bands[-1]:
            bands.append([])
            room = width - left
        bands[-1].append(place)
        room -= needed
    return bands


def _band(table: Table, texts: Sequence[Sequence[str]], places: Sequence[int]) -> RichTable:
    """Some of the columns."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, GAP // 2), collapse_padding=True
    )
    drawn.add_column("view", no_wrap=True)
    drawn.add_column("edits", justify="right", no_wrap=True)
    for place in places:
        longest_word = max(map(len, table.columns[place].title.split()))
        width = max(longest_word, *(len(row[place]) for row in texts))
        drawn.add_column(Text(table.columns[place].title), justify="right", min_width=width)
    for view, group in groupby(zip(table.rows, texts, strict=True), key=lambda pair: pair[0].view):
        for place, (row, text) in enumerate(group):
            drawn.add_row(
                Text(view if place == 0 else ""),
                str(row.edits),
                *(text[column] for column in places),
            )
        drawn.add_section()
    return drawn
