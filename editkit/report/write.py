"""`editkit report`: reads runs, and writes the page, the figures and the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from editkit.files import write_atomically
from editkit.records.find import load_runs
from editkit.report import formats
from editkit.report.compare.against_published import compare_with_published
from editkit.report.compare.collapse import collapses
from editkit.report.compare.published import load_published
from editkit.report.compare.significance import compare
from editkit.report.compare.subjects import measured, pairs
from editkit.report.compare.summary import summaries
from editkit.report.figures import curves, heatmaps, print_sheets, scatter
from editkit.report.figures.panels import sheets
from editkit.report.figures.target_probability import target_probabilities
from editkit.report.notes import notes_of
from editkit.report.page import Content, page

PAGE = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """The files of a report."""

    page: Path
    figures: tuple[Path, ...]
    tables: tuple[Path, ...]


def report(
    folders: Iterable[Path],
    to: Path,
    *,
    title: str | None = None,
    published: Iterable[Path] | None = None,
) -> Written:
    """Writes `report.html`, `figures/*.png|pdf` and `tables/*.md|tex` into the folder `to`.

    If `to` ends in .html and is no folder, it is the page itself; figures and tables are written
    into the folder of that name without the suffix.

    Args:
        folders: runs, or folders of runs.
        published: files like `experiments/*/published.csv`, which are the default.

    Raises ConfigError if there is no run, a file is malformed, a table would mix protocols or task
    versions, or a library is missing.
    """
    curves.require_plotly()
    names_the_page = to.suffix == ".html" and not to.is_dir()
    page_path, to = (to, to.with_suffix("")) if names_the_page else (to / PAGE, to)
    folders = tuple(folders)
    runs = load_runs(folders)
    subjects, notes = measured(runs)
    tables, twins = summaries(subjects), pairs(subjects)
    curve_sheets = [*sheets(subjects), *target_probabilities(subjects)]
    comparisons = compare_with_published(subjects, load_published(published))
    heatmap_sheets, scatters = list(heatmaps.heatmaps(subjects)), scatter.scatters(subjects)
    drawings = [
        *((sheet.title, curves.draw(sheet)) for sheet in curve_sheets),
        *((sheet.title, heatmaps.draw_interactive(sheet)) for sheet in heatmap_sheets),
        *((sheet.title, scatter.draw_interactive(sheet)) for sheet in scatters),
    ]
    content = Content(
        title=title or "editkit: " + ", ".join(folder.name for folder in folders),
        runs=runs,
        notes=[*notes, *(note for run in runs for note in notes_of(run))],
        tables=tables,
        comparisons={table.title: tuple(compare(table, twins)) for table in tables if table.edits},
        drawings=drawings,
        published=comparisons,
        collapses=tuple(collapses([each for each in subjects if not each.run.is_foreign])),
    )
    plotted = {sheet.name: print_sheets.draw(sheet) for sheet in curve_sheets}
    plotted |= {sheet.name: heatmaps.draw(sheet) for sheet in heatmap_sheets}
    plotted |= {sheet.name: scatter.draw(sheet) for sheet in scatters}
    figures = [
        path
        for name, figure in plotted.items()
        for path in print_sheets.save(figure, to / "figures", name)
    ]
    texts: dict[str, Callable[[], str]] = {
        "summary.md": lambda: "\n".join(formats.markdown(table) for table in tables),
        "summary.tex": lambda: "\n".join(formats.latex(table) for table in tables),
    }
    if comparisons:
        texts["published.md"] = lambda: formats.published_markdown(comparisons)
        texts["published.tex"] = lambda: formats.published_latex(comparisons)
    written = []
    for name, format_text in texts.items():
        written.append(to / "tables" / name)
        write_atomically(written[-1], format_text().encode())
    write_atomically(page_path, page(content).encode())
    return Written(page=page_path, figures=tuple(figures), tables=tuple(written))
