"""Summaries as text for papers and pages: Markdown, LaTeX (booktabs) and HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence

from editkit.report.compare.against_published import HEAD as PUBLISHED_HEAD
from editkit.report.compare.against_published import PublishedComparison, cells_of, notes_of
from editkit.report.compare.significance import Comparison
from editkit.report.compare.summary import Mean, Summary, SummaryColumn, SummaryRow, text_of
from editkit.report.escape import escape, escape_cell, visible

HEAD = ("model", "editor", "restraint", "seeds")
_LATEX = {
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}


def caption(table: Summary) -> str:
    """The caption: protocol, aggregation, units and marks."""
    over = "over all edits so far" if table.is_of_all_edits else table.manner
    scope = (
        f"Protocol '{table.protocol}', {over}"
        if table.is_editing and table.protocol
        else f"{over[0].upper()}{over[1:]}"
    )
    return (
        f"{scope}; mean ± standard deviation over seeds; metrics and tasks in percent; best of "
        "each model in bold; "
        "n/f: not finite; -: not measured; seeds m/n: n were run, m came so far."
    )


def markdown(table: Summary) -> str:
    """A GitHub table."""
    lines = [
        [*HEAD, *(column.title for column in table.columns)],
        [*["---"] * len(HEAD), *["---:"] * len(table.columns)],
    ]
    for row in table.rows:
        cells = [f"**{text}**" if best else text for text, best in _cells(table, row)]
        lines.append([row.model, row.editor, row.restraint, _seeds(row), *cells])
    return (
        f"### {escape_cell(table.title)}\n\n"
        + "\n".join(f"| {' | '.join(map(escape_cell, line))} |" for line in lines)
        + f"\n\n{escape_cell(caption(table))}\n"
    )


def latex(table: Summary) -> str:
    """A table for booktabs, with its caption."""
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{{'l' * len(HEAD)}{'r' * len(table.columns)}}}",
        r"\toprule",
    ]
    lines.append(
        " & ".join(tex(title) for title in (*HEAD, *(column.title for column in table.columns)))
        + r" \\"
    )
    lines.append(r"\midrule")
    for row in table.rows:
        cells = [_tex_cell(text, best) for text, best in _cells(table, row)]
        lines.append(
            " & ".join(
                [
                    *(tex(text) for text in (row.model, row.editor, row.restraint, _seeds(row))),
                    *cells,
                ]
            )
            + r" \\"
        )
    lines += [
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{tex(table.title)}. {tex(caption(table))}}}",
        r"\end{table}",
        "",
    ]
    return "\n".join(lines)


def html(table: Summary) -> str:
    """A table with its caption."""
    head = "".join(f"<th class='text'>{escape(title)}</th>" for title in HEAD)
    head += "".join(f"<th>{escape(column.title)}</th>" for column in table.columns)
    body = []
    for row in table.rows:
        names = "".join(
            f"<th scope='row'>{escape(text)}</th>"
            for text in (row.model, row.editor, row.restraint, _seeds(row))
        )
        cells = "".join(
            f"<td class='best'>{escape(text)}</td>" if best else f"<td>{escape(text)}</td>"
            for text, best in _cells(table, row)
        )
        body.append(f"<tr>{names}{cells}</tr>")
    top = f"<caption>{escape(caption(table))}</caption><thead><tr>{head}</tr></thead>"
    return f"<table>{top}<tbody>{''.join(body)}</tbody></table>"


def published_markdown(comparisons: Sequence[PublishedComparison]) -> str:
    """Published and measured numbers: a GitHub table for each preset."""
    parts = []
    for preset, rows in _by_preset(comparisons).items():
        lines = [PUBLISHED_HEAD, ["---"] * len(PUBLISHED_HEAD), *(cells_of(row) for row in rows)]
        notes = "".join(f"\n{note}\n" for note in notes_of(rows))
        parts.append(
            f"### {escape_cell(preset)}\n\n"
            + "\n".join(f"| {' | '.join(map(escape_cell, line))} |" for line in lines)
            + f"\n{notes}"
        )
    return "\n".join(parts)


def published_latex(comparisons: Sequence[PublishedComparison]) -> str:
    """Published and measured numbers: a booktabs table for each preset."""
    lines = []
    for preset, rows in _by_preset(comparisons).items():
        lines += [
            r"\begin{table}",
            r"\centering",
            rf"\begin{{tabular}}{{{'l' * len(PUBLISHED_HEAD)}}}",
            r"\toprule",
        ]
        lines += [" & ".join(tex(text) for text in PUBLISHED_HEAD) + r" \\", r"\midrule"]
        lines += [" & ".join(tex(text) for text in cells_of(row)) + r" \\" for row in rows]
        caption = " ".join([f"{preset}: published and measured.", *notes_of(rows)])
        lines += [
            r"\bottomrule",
            r"\end{tabular}",
            rf"\caption{{{tex(caption)}}}",
            r"\end{table}",
            "",
        ]
    return "\n".join(lines)


def _by_preset(comparisons: Sequence[PublishedComparison]) -> dict[str, list[PublishedComparison]]:
    by_preset: dict[str, list[PublishedComparison]] = {}
    for row in comparisons:
        by_preset.setdefault(row.published.preset, []).append(row)
    return by_preset


def comparison_rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Cells of a table of t-tests: model, editor, restraint, metric, difference, n, t, p."""
    return [
        [
            *comparison.label,
            comparison.metric,
            _difference(comparison),
            str(comparison.n),
            "-" if comparison.t is None else f"{comparison.t:.2f}",
            comparison.remark or p_text(comparison.p),
        ]
        for comparison in comparisons
    ]


def p_text(p: float | None) -> str:
    """A p value in the form of papers."""
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def tex(text: str) -> str:
    """Text for LaTeX, with its special characters escaped."""
    escaped = "".join(
        _LATEX.get(character, character) for character in visible(text).replace("\\", "/")
    )
    return escaped.replace("±", r"$\pm$")


def _cells(table: Summary, row: SummaryRow) -> list[tuple[str, bool]]:
    return [
        (text_of(cell, column), _is_best(cell, column))
        for cell, column in zip(row.cells, table.columns, strict=True)
    ]


def _is_best(cell: Mean | None, column: SummaryColumn) -> bool:
    return cell is not None and cell.is_best and column.better is not None


def _tex_cell(text: str, best: bool) -> str:
    mean, mark, deviation = text.partition(" ± ")
    shown = rf"\textbf{{{tex(mean)}}}" if best else tex(mean)
    return shown + (rf" $\pm$ {tex(deviation)}" if mark else "")


def _seeds(row: SummaryRow) -> str:
    return (
        str(len(row.seeds))
        if len(row.seeds) == row.num_runs
        else f"{len(row.seeds)}/{row.num_runs}"
    )


def _difference(comparison: Comparison) -> str:
    value = comparison.difference
    if math.isnan(value):
        return "n/f"
    return f"{100 * value:+.1f}" if comparison.is_fraction else f"{value:+.3g}"
