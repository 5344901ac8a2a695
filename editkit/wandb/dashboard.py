"""The papers' panels as a W&B workspace: condition number, L1 norm, editing metrics and tasks
against edits, grouped by restraint.

W&B's own library makes the definition, which is written as a file. One more call saves it on W&B.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError, message
from editkit.files import write_atomically
from editkit.records.reader import RunRecords
from editkit.report.columns import EDITING_ORDER
from editkit.report.tables import is_fraction, is_summarised
from editkit.trackers.history import EDITS, STEP
from editkit.wandb.client import INSTALL

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

VIEW = "[^/]+"  # any view; each has its own line
WEIGHTS = {
    "condition number (PRUNE, Figure 2)": ("condition_number", True),
    "L1 norm (D4S and EAC: it grows with the edits)": ("l1_norm", False),
}


def workspace(runs: Sequence[RunRecords], *, project: str, entity: str, name: str) -> Workspace:
    """The workspace, with panels for the measurements of `runs`. Without runs it has panels for all
    known metrics.

    Raises:
        ConfigError: W&B's library is missing.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError(message("dashboard", "wandb-workspaces is not installed", fix=INSTALL))
    import wandb_workspaces.workspaces as ws

    sections = [
        _section("Weights", _weight_panels()),
        *_editing_sections(runs),
        *_task_sections(runs),
    ]
    sections.append(
        _section(
            "Edits",
            [
                _panel("loss of the target search", "^edit/loss$"),
                _panel("seconds an edit", "^edit/seconds$"),
            ],
        )
    )
    sections.append(
        _section(
            "One matrix each",
            [
                _panel(
                    "largest singular value of the total (PRUNE, Table 1)",
                    r"/total_sigma_max$",
                    log=True,
                )
            ],
        )
    )
    return ws.Workspace(
        project=project,
        entity=entity,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=50),
        runset_settings=ws.RunsetSettings(
            groupby=[ws.Config(f"label_{key}") for key in ("model", "editor", "restraint")]
        ),
    )


def definition(made: Workspace) -> dict[str, Any]:
    """The workspace as W&B stores it."""
    view = made._to_model()  # the library offers no public way to it short of saving
    return {
        "entity": made.entity,
        "project": made.project,
        "name": made.name,
        "spec": json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True)),
    }


def write(made: Workspace, to: Path) -> None:
    """Writes the definition as JSON."""
    write_atomically(to, json.dumps(definition(made), indent=1).encode())


def _weight_panels() -> list[Any]:
    return [
        _panel(title, rf"^weights/{metric}/{VIEW}$", log=is_log)
        for title, (metric, is_log) in WEIGHTS.items()
    ]


def _editing_sections(runs: Sequence[RunRecords]) -> Iterable[Section]:
    """A section for each protocol: protocols never share a panel."""
    records = [
        record
        for run in runs
        for record in run.evals
        if record.measurement.kind == "editing" and is_summarised(record)
    ]
    measured = {
        (record.measurement.protocol or "", record.measurement.metric) for record in records
    }
    if not runs:
        measured = {
            (protocol, metric)
            for protocol in ("probability", "argmax", "token", "generate")
            for metric in EDITING_ORDER
        }
    for protocol in dict.fromkeys(protocol for protocol, _ in sorted(measured)):
        metrics = sorted((metric for each, metric in measured if each == protocol), key=_place)
        panels = [
            _panel(
                metric,
                f"^editing/{protocol}/(.+/)?{re.escape(metric)}/{VIEW}$".replace("//", "/"),
                percent=is_fraction("editing", metric),
            )
            for metric in metrics
        ]
        yield _section(f"Editing, protocol {protocol}", panels)


def _task_sections(runs: Sequence[RunRecords]) -> Iterable[Section]:
    """A section for each suite, a panel for each task and metric."""
    keys = {
        (record.measurement.suite or "", record.measurement.task or "", record.measurement.metric)
        for run in runs
        for record in run.evals
        if record.measurement.kind == "downstream" and is_summarised(record)
    }
    if not runs:
        yield _section("Tasks", [_panel("tasks", "^downstream/", percent=True)])
    for suite in sorted({suite for suite, _, _ in keys}):
        tasks = sorted((task, metric) for each, task, metric in keys if each == suite)
        panels = [
            _panel(
                f"{task}: {metric}", f"^downstream/{suite}/{task}/{metric}/{VIEW}$", percent=True
            )
            for task, metric in tasks
        ]
        yield _section(f"Tasks, suite {suite}", panels)


def _section(name: str, panels: list[Any]) -> Section:
    import wandb_workspaces.workspaces as ws

    return ws.Section(name=name, panels=panels, is_open=True)


def _panel(title: str, pattern: str, *, log: bool = False, percent: bool = False) -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(  # type: ignore[attr-defined] # re-exported without saying so
        title=title,
        x=EDITS,
        metric_regex=pattern,
        log_y=log or None,
        range_y=(0.0, 1.0) if percent else (None, None),
        title_x="edits",
        groupby_aggfunc="mean",
        groupby_rangefunc="stddev",
    )


def _place(metric: str) -> tuple[int, str]:
    return (EDITING_ORDER.index(metric) if metric in EDITING_ORDER else len(EDITING_ORDER), metric)
