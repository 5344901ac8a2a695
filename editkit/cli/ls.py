"""`editkit ls`: the options of the configuration groups."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editkit.cli.arguments import ConfigDir, console
from editkit.config.compose import options
from editkit.errors import ConfigError, message

PAIRS = "pairs"


def list_options(
    group: Annotated[
        str | None,
        typer.Argument(
            help="List only this group; pairs: which restraint works with which editor."
        ),
    ] = None,
    config_dir: ConfigDir = None,
) -> None:
    """List the options of every configuration group. A star marks the default."""
    from rich.table import Table

    if group == PAIRS:
        list_pairs(config_dir)
        return
    listed = list(options(config_dir))
    groups = sorted({option.group for option in listed})
    if group is not None and group not in groups:
        expected = f"one of {', '.join(sorted((*groups, PAIRS)))}"
        raise ConfigError(message("group", "unknown group", got=group, expected=expected))
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(no_wrap=True)
    table.add_column()
    previous = ""
    for option in listed:
        if group in (None, option.group):
            if previous and previous != option.group:
                table.add_row()
            table.add_row(
                "" if option.group == previous else option.group,
                option.name + (" *" if option.is_default else ""),
                option.about,
            )
            previous = option.group
    console().print(table, highlight=False, markup=False)


def list_pairs(config_dir: Path | None) -> None:
    """Which restraint works with which editor, by the places at which they act."""
    from rich.table import Table

    from editkit.config.pairs import pairs
    from editkit.restraints.base import PLACES

    table = Table(box=None, pad_edge=False)
    for title in ("editor", *PLACES):
        table.add_column(
            title, no_wrap=title == "editor", style="cyan" if title == "editor" else ""
        )
    for row in pairs(config_dir):
        table.add_row(row.editor, *(" ".join(row.restraints[place]) or "-" for place in PLACES))
    console().print(table, highlight=False, markup=False)
