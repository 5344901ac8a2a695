"""`editkit show`: the results of one run in the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def show(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run: outputs/.../seed<k>; or results of MEMIT's or EasyEdit's code."
        ),
    ],
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Protocol of the editing metrics, such as probability or argmax; all compares the"
            " protocols at the last milestone."
        ),
    ] = None,
) -> None:
    """Show the results of a run as a table.

    A folder of MEMIT's case_*.json, or a *_results.json of EasyEdit, is shown as a foreign run.
    """
    from rich.console import Console

    from editkit.report.show import show as summary

    Console().print(summary(run, protocol=protocol))
