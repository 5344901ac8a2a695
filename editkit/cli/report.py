"""`editkit report`: a comparison of runs as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editkit.cli.arguments import RunFolders


def report(
    folders: RunFolders,
    to: Annotated[Path, typer.Option(help="Folder, or page x.html, to write.")] = Path("report"),
    title: Annotated[
        str | None, typer.Option(help="Title of the page.", show_default=False)
    ] = None,
    published: Annotated[
        list[Path] | None,
        typer.Option(
            help="Published numbers to compare with: files like experiments/*/published.csv.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a page that compares runs, with figures (PNG, PDF) and tables (LaTeX, Markdown).

    Folders of MEMIT's case_*.json, and *_results.json of EasyEdit, are compared as foreign runs.
    """
    from editkit.report.write import report as write

    written = write(folders, to, title=title, published=published)
    size = written.page.stat().st_size / 1e6
    typer.echo(
        f"{written.page} ({size:.1f} MB), {len(written.figures)} figures,"
        f" {len(written.tables)} tables"
    )
