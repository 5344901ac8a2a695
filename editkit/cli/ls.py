"""`editkit ls`: the options of the configuration groups."""

from __future__ import annotations

from typing import Annotated

import typer

from editkit.cli.arguments import ConfigDir, console
from editkit.config.compose import options
from editkit.errors import ConfigError, message


def list_options(
    group: Annotated[str | None, typer.Argument(help="List only this group.")] = None,
    config_dir: ConfigDir = None,
) -> None:
    """List the options of every configuration group. A star marks the default."""
    from rich.table import Table

    listed = list(options(config_dir))
    groups = sorted({option.group for option in listed})
    if group is not None and group not in groups:
        expected = f"one of {', '.join(groups)}"
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
