"""`editkit report`: a comparison of runs as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from editkit.cli.arguments import RunFolders


def report(
    folders: RunFolders,
    to: Annotated[Path, typer.Option(help="Folder, or page x.html, to write.")] = Path("report"),
    leaderboard: Annotated[
        bool,
        typer.Option(
            "--leaderboard",
            help="The arguments are certificates (`editkit certify`), whose numbers become tables:"
            " one for each model, dataset and protocol.",
        ),
    ] = False,
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
    if leaderboard:
        _leaderboard(folders, to, title=title, published=published)
        return
    from editkit.report.write import report as write

    written = write(folders, to, title=title, published=published)
    size = written.page.stat().st_size / 1e6
    typer.echo(
        f"{written.page} ({size:.1f} MB), {len(written.figures)} figures,"
        f" {len(written.tables)} tables"
    )


def _leaderboard(files: list[Path], to: Path, **others: object) -> None:
    from editkit.certify.leaderboard import PAGE, TEXT, leaderboard, text_of
    from editkit.errors import ConfigError, message

    problem = "has no meaning with --leaderboard"
    given = [message(f"--{name}", problem) for name, value in others.items() if value]
    if to.suffix:
        problem = "a leaderboard is a page and a text"
        given.append(message("--to", problem, got=str(to), expected="a folder"))
    if given:
        raise ConfigError(given)
    tables = leaderboard(files, to)
    typer.echo(text_of(tables))
    typer.echo(f"written: {to / PAGE}, {to / TEXT}")
