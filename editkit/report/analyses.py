"""What `editkit analyse` wrote into the runs' folders, as parts of the page."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError, message
from editkit.records.reader import RunRecords
from editkit.report.escape import escape

FOLDER = "analysis"  # in the run's folder


def analyses(runs: Sequence[RunRecords]) -> Iterator[tuple[RunRecords, Path, Mapping[str, Any]]]:
    """Each run's analyses: the file and its content.

    Raises:
        ConfigError: a file is no analysis.
    """
    for run in runs:
        for path in sorted((run.folder / FOLDER).glob("*.json")):
            try:
                content = json.loads(path.read_text())
                content["analysis"], content["tables"]
            except (ValueError, KeyError, TypeError) as error:
                fix = "delete it, or make the analysis again"
                raise ConfigError(message(str(path), f"no analysis ({error})", fix=fix)) from None
            yield run, path, content


def sections(runs: Sequence[RunRecords], names: Mapping[Path, str]) -> Iterable[str]:
    """The part of the page, empty without analyses.

    Args:
        names: of the runs, by folder.
    """
    parts = []
    for run, path, content in analyses(runs):
        title = f"{content['analysis']}: {names[run.folder]}, {content['view']}"
        parts.append(f"<h3>{escape(title)}</h3>")
        parts.append(f"<p class='note'>After step {content['step']}.</p>")
        figure = path.with_suffix(".png")
        if figure.exists():
            data = base64.b64encode(figure.read_bytes()).decode()
            style = "max-width:100%;width:52rem"
            parts.append(
                f"<img alt='{escape(title)}' style='{style}' src='data:image/png;base64,{data}'>"
            )
        parts += [_table(table) for table in content["tables"]]
    return ["<h2>Analyses</h2>", *parts] if parts else []


def _table(table: Mapping[str, Any]) -> str:
    head = "".join(f"<th class='text'>{escape(cell)}</th>" for cell in table["head"])
    rows = "".join(
        "<tr>" + "".join(f"<td class='text'>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table["rows"]
    )
    caption = f"<caption>{escape(table['title'])}</caption>"
    body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
    return f"<div class='wide'><table>{caption}{body}</table></div>"
