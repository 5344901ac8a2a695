"""The page: one self-contained HTML file, plotly's script included."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from editkit.records.reader import RunRecords
from editkit.report import formats
from editkit.report.analyses import sections
from editkit.report.compare.against_published import (
    HEAD,
    ONLY,
    PublishedComparison,
    cells_of,
    notes_of,
)
from editkit.report.compare.collapse import Collapses
from editkit.report.compare.significance import Comparison
from editkit.report.compare.summary import Summary
from editkit.report.escape import escape
from editkit.report.figures import curves
from editkit.report.figures.panels import MAX_POINTS
from editkit.report.labels import labels
from editkit.report.tables import edits_by_step

KINDS = (
    "Two kinds of number are called specificity in papers and are never mixed here. locality: the "
    "edited model answers as the unedited one, or under the protocol probability still prefers the "
    "true answer. specificity: the true answer is right, whatever the unedited model says."
)
KIND_NAMES = ("locality", "specificity")
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto;
  max-width: 1440px; padding: 1rem 2rem 4rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { margin-top: 2.5rem;
  border-bottom: 1px solid #ddd; } h3 { margin-bottom: .3rem; }
table { border-collapse: collapse; margin: .5rem 0 1.2rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
caption { caption-side: bottom; text-align: left; color: #666; font-size: .85rem;
  padding-top: .3rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #eee;
  white-space: nowrap; }
thead th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom;
  min-width: 4rem; }
th[scope=row], td.text, thead th.text { text-align: left; } th[scope=row] { font-weight: normal; }
td.best { font-weight: bold; } .bad { color: #b00020; } .note { color: #666; }
.published th, .published td { padding: .2rem .4rem; } tr.only td { color: #767676; }
summary { cursor: pointer; } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto;
  font-size: .8rem; }
"""


@dataclass(frozen=True, kw_only=True)
class Content:
    """What a page shows. `drawings` are fragments that plotly drew."""

    title: str
    runs: Sequence[RunRecords]
    notes: Sequence[str]
    tables: Sequence[Summary]
    comparisons: Mapping[str, Sequence[Comparison]]  # by the table's title
    drawings: Sequence[tuple[str, str]]  # title, fragment
    published: Sequence[PublishedComparison]
    collapses: Sequence[Collapses]


def page(content: Content) -> str:
    """The whole page."""
    parts = [
        f"<h1>{escape(content.title)}</h1>",
        f"<p>{escape(overview(content.runs))}</p>",
        *(f"<p class='note'>{escape(note)}</p>" for note in content.notes),
        "<h2>Summary</h2>",
        *_summaries(content),
        "<h2>Curves</h2>",
        "<p class='note'>A line is the mean over seeds, its band one standard deviation; "
        "unrestrained models are dashed. A click on a name "
        f"hides or shows it. Of a line of more than {MAX_POINTS} points, {MAX_POINTS} are drawn, "
        "evenly spread, the first and the last among them.</p>",
        *(f"<h3>{escape(title)}</h3>{fragment}" for title, fragment in content.drawings),
        *sections(content.runs, _names(content.runs)[1]),
        *_published(content.published),
        "<h2>Failures and collapses</h2>",
        *_failures(content.runs),
        *_collapses(content.collapses),
        "<h2>Runs</h2>",
        *_runs(content.runs),
    ]
    script = f"<script>{curves.library()}</script>" if content.drawings else ""
    meta = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    head = f"{meta}<title>{escape(content.title)}</title>"
    icon = "<link rel='icon' href='data:,'>"
    head += f"{icon}<style>{STYLE}</style>{script}"
    body = "".join(parts)
    return f"<!DOCTYPE html><html lang='en'><head>{head}</head><body>{body}</body></html>\n"


def overview(runs: Sequence[RunRecords]) -> str:
    """How many runs, and how they ended."""
    counts = {
        status: sum(run.status == status for run in runs)
        for status in ("done", "failed", "unfinished", "foreign")
    }
    ended = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    seeds = sorted({int(run.config.get("seed", 0) or 0) for run in runs})
    return f"{len(runs)} runs ({ended}), seeds {', '.join(map(str, seeds))}."


def table_of(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    caption: str = "",
    greyed: Collection[int] = (),
) -> str:
    """A plain table. Columns of numbers are right-aligned, all others left-aligned. The rows at the
    places `greyed` are grey.
    """
    rows = list(rows)
    kind = [
        "" if all(_is_number(row[place]) for row in rows) else " class='text'"
        for place in range(len(head))
    ]
    titles = "".join(f"<th{kind[place]}>{escape(title)}</th>" for place, title in enumerate(head))
    body = "".join(
        f"<tr{' class=only' if number in greyed else ''}>"
        + "".join(f"<td{kind[place]}>{escape(text)}</td>" for place, text in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    below = f"<caption>{escape(caption)}</caption>" if caption else ""
    head = f"<thead><tr>{titles}</tr></thead>"
    return f"<div class='wide'><table>{below}{head}<tbody>{body}</tbody></table></div>"


def _is_number(text: str) -> bool:
    return text in ("-", "?", "None", "", ONLY) or text[:1] in "+-<" or text[:1].isdigit()


def _summaries(content: Content) -> Iterable[str]:
    """The summary tables with their t-tests. Only those at the last milestone of each dataset and
    protocol are unfolded.
    """
    last: dict[tuple[str, str | None], int] = {}
    for table in content.tables:
        kind = table.dataset, table.protocol
        last[kind] = max(last.get(kind, 0), table.edits)
    for table in content.tables:
        body = f"<div class='wide'>{formats.html(table)}</div>"
        if comparisons := content.comparisons.get(table.title):
            head = ("model", "editor", "restraint", "metric", "difference", "n", "t", "p")
            caption = (
                "Restrained minus unrestrained, seed by seed; two-sided paired t-test, p not "
                "corrected for the number of comparisons."
            )
            opened = " open" if any(comparison.p is not None for comparison in comparisons) else ""
            rows = table_of(head, formats.comparison_rows(comparisons), caption=caption)
            body += f"<details{opened}><summary>paired t-tests</summary>{rows}</details>"
        if table.edits == last[table.dataset, table.protocol]:
            yield f"<h3>{escape(table.title)}</h3>{body}"
        else:
            yield f"<details><summary>{escape(table.title)}</summary>{body}</details>"


def _published(comparisons: Sequence[PublishedComparison]) -> Iterable[str]:
    if not comparisons:
        return
    yield "<h2>Comparison with the published numbers</h2>"
    if any(row.is_stand_in for row in comparisons):
        yield (
            "<p class='note'>Where a smaller model stands in for the paper's (scale=tiny or "
            "scale=small), compare the effect, not the numbers: which row is better, what grows, "
            "what collapses.</p>"
        )
    if any(row.published.metric.startswith(KIND_NAMES) for row in comparisons):
        yield f"<p class='note'>{escape(KINDS)}</p>"
    for preset in dict.fromkeys(row.published.preset for row in comparisons):
        of_preset = [row for row in comparisons if row.published.preset == preset]
        rows = [cells_of(row) for row in of_preset]
        is_same = [len({cells[place] for cells in rows}) == 1 for place in range(len(HEAD))]
        # A source that all rows share stands in the heading. Empty columns are left out. So the
        # measured numbers fit on the page.
        kept = [
            place
            for place in range(len(HEAD))
            if not (is_same[place] and (place == 0 or rows[0][place] == "-"))
        ]
        table = table_of(
            [HEAD[place] for place in kept],
            [[cells[place] for place in kept] for cells in rows],
            greyed=[place for place, row in enumerate(of_preset) if row.is_published_only],
        )
        yield f"<h3>{escape(f'{preset}: {rows[0][0]}' if is_same[0] else preset)}</h3>"
        yield f"<div class='published'>{table}</div>"
        yield from (f"<p class='note'>{escape(note)}</p>" for note in notes_of(of_preset))


def _collapses(tables: Sequence[Collapses]) -> Iterable[str]:
    for table in tables:
        head = ("model", "editor", "restraint", *table.columns)
        caption = (
            "Edits until each threshold was crossed, between two milestones; by seed if seeds "
            "differ; -: not measured."
        )
        yield f"<h3>Collapse points, {escape(table.dataset)}</h3>"
        yield table_of(
            head,
            [(*label, *cells) for label, cells in zip(table.labels, table.cells, strict=True)],
            caption=caption,
        )


def _names(runs: Sequence[RunRecords]) -> tuple[str, dict[Path, str]]:
    """The folder that holds all runs, and the name of each run below it."""
    try:
        root = Path(os.path.commonpath([run.folder.parent.parent for run in runs]))
    except ValueError:  # no runs, or both absolute and relative folders
        return ".", {run.folder: str(run.folder) for run in runs}
    return str(root), {run.folder: str(run.folder.relative_to(root)) for run in runs}


def _failures(runs: Sequence[RunRecords]) -> Iterable[str]:
    names, rows = _names(runs)[1], []
    for run in runs:
        edits = edits_by_step(run.steps)
        if run.failure is not None:
            step = run.failure.get("step", run.failure.get("saved_step"))
            rows.append(
                [
                    names[run.folder],
                    str(run.failure.get("kind", "error")),
                    str(step),
                    str(run.failure.get("error", ""))[:300],
                ]
            )
        elif run.status == "unfinished":
            rows.append(
                [
                    names[run.folder],
                    "unfinished",
                    str(run.steps[-1].step if run.steps else 0),
                    "cut off or still running",
                ]
            )
        lost = [step for step in run.steps if step.nonfinite is not None]
        if lost and run.failure is None:
            requests = ", ".join(lost[0].requests)
            text = f"{lost[0].nonfinite}, requests {requests}; {len(lost)} such steps"
            rows.append([names[run.folder], "not finite", str(edits[lost[0].step]), text])
        unscored = sum(record.measurement.nonfinite or 0 for record in run.evals)
        if unscored:
            rows.append(
                [
                    names[run.folder],
                    "not finite",
                    "-",
                    f"{unscored} scores were not finite; they count as failures",
                ]
            )
    yield table_of(("run", "what", "step", "why"), rows) if rows else "<p>None.</p>"


def _runs(runs: Sequence[RunRecords]) -> Iterable[str]:
    import yaml

    (root, names), rows = _names(runs), []
    for run in runs:
        provenance = run.provenance
        named = labels(run.config)
        memory = (provenance.get("peak_memory_bytes") or {}).values()
        packages = provenance.get("packages") or {}
        rows.append(
            [
                names[run.folder],
                run.status,
                str(run.config.get("seed", "?")),
                *(named[name] for name in ("model", "editor", "restraint", "dataset")),
                str(max(edits_by_step(run.steps).values(), default=0)),
                f"{provenance['wall_seconds']:,.0f}" if "wall_seconds" in provenance else "?",
                f"{max(memory) / 2**30:.2f}" if memory else "?",
                str(provenance.get("device", "?")),
                str(packages.get("editkit", "?")),
                str(provenance.get("git", "?"))[:10],
            ]
        )
    head = (
        "run",
        "status",
        "seed",
        "model",
        "editor",
        "restraint",
        "dataset",
        "edits",
        "seconds",
        "peak GiB",
        "device",
        "editkit",
        "git",
    )
    yield table_of(head, rows, caption=f"Runs below {root}")
    for run in runs:
        config = yaml.safe_dump(dict(run.config), sort_keys=False) if run.config else "not written"
        provenance_text = json.dumps(dict(run.provenance), indent=1)
        yield (
            f"<details><summary>{escape(names[run.folder])}: configuration and provenance</summary>"
            f"<pre>{escape(config)}</pre><pre>{escape(provenance_text)}</pre></details>"
        )
