"""Runs as `editkit report` compares them: their subjects, one summary table, and the text of its
cells."""

from __future__ import annotations

from pathlib import Path

from editkit.records.find import load_runs
from editkit.report.compare.subjects import Measured, measured
from editkit.report.compare.summary import Summary, summaries, text_of


def subjects_in(root: Path) -> tuple[Measured, ...]:
    return measured(load_runs([root]))[0]


def table(root: Path, *, protocol: str | None = "probability", edits: int = 4) -> Summary:
    (found,) = [
        each
        for each in summaries(subjects_in(root))
        if each.edits == edits and each.protocol == protocol
    ]
    return found


def rows_of(found: Summary) -> dict[tuple[str, str], dict[str, str]]:
    """Text of every cell, by editor and restraint, then by title."""
    return {
        (row.editor, row.restraint): {
            column.title: text_of(cell, column)
            for column, cell in zip(found.columns, row.cells, strict=True)
        }
        for row in found.rows
    }
