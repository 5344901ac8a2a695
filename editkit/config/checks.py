"""Checks of parts that do not fit together. Each function adds to the problems of the parts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from editkit.config.experiment import Settings
from editkit.config.parts import Parts
from editkit.datasets.base import LoadedDataset
from editkit.editors.base import AbstractAnyEditor, AbstractSideEditor
from editkit.errors import ConfigError, message
from editkit.evaluation.base import AbstractEvaluator, AbstractSuite
from editkit.model.load import ModelConfig
from editkit.restraints.base import Restraints
from editkit.stats.corpus import StatsConfig
from editkit.stats.imported import lacking
from editkit.stats.remote import absent


def check_combination(
    parts: Parts,
    settings: Settings | None,
    editor: AbstractAnyEditor[Any] | None,
    stats: StatsConfig | None,
) -> None:
    """The editor with statistics, devices and batch size, and the folder of the outputs."""
    name = f"editor={parts.name_of('editor')}"
    if stats is not None and stats.source == "none" and editor is not None and editor.needs_moments:
        parts.problems.add(
            message(
                "stats",
                f"{name} needs second moments",
                got="none",
                expected="world, facts, text, hub or imported",
                fix="choose stats=world|facts|text|hub (ROME also takes editor.covariance=null)",
            )
        )
    kind = parts.editor_class()
    device_map = (parts.config.get("model") or {}).get("device_map")
    if device_map is not None and kind is not None and not kind.spans_devices:
        problem = f"{name} needs the whole model on one device"
        parts.problems.add(message("model.device_map", problem, got=device_map, expected="null"))
    if settings is None:
        return
    limit = kind.max_batch_size if kind is not None else None
    if limit is not None and settings.batch_size > limit:
        number = "one request" if limit == 1 else f"{limit} requests"
        parts.problems.add(
            message(
                "batch_size",
                f"{name} edits {number} at a time",
                got=settings.batch_size,
                expected=f"at most {limit}",
                fix=f"set batch_size={limit}",
            )
        )
    if editor is not None and editor.is_at_once and settings.batch_size < settings.edits:
        parts.problems.add(
            message(
                "batch_size",
                f"{name} with an edited model has all edits at once",
                got=settings.batch_size,
                expected=f"edits={settings.edits} or more",
                fix=f"set batch_size={settings.edits}",
            )
        )
    if settings.ledger.keep:
        _check_ledger(parts, settings, name, kind)
    outputs = settings.paths.outputs
    if obstacle := not_writable(Path(outputs).expanduser()):
        parts.problems.add(message("paths.outputs", obstacle, got=outputs))


def _check_ledger(
    parts: Parts, settings: Settings, name: str, kind: type[AbstractAnyEditor[Any]] | None
) -> None:
    """A ledger needs updates of weights that add up."""
    if settings.rollback:
        problem = "with rollback=true every batch is taken back, so there is no sum of edits"
        fix = "set ledger.keep=false or rollback=false"
        parts.problems.add(message("ledger.keep", problem, got=True, fix=fix))
    if kind is not None and issubclass(kind, AbstractSideEditor):
        problem = f"what {name} puts beside the weights is one state and no sum of updates"
        expected = "an editor of weights"
        fix = "set ledger.keep=false; `editkit.Session.undo` takes back the last edit"
        parts.problems.add(message("ledger.keep", problem, got=True, expected=expected, fix=fix))


def check_model(parts: Parts, model: ModelConfig | None) -> None:
    """The files of the model, as far as that needs neither the hub nor its weights."""
    if model is not None:
        parts.problems.add_all(model.source_problems())


def check_imported(
    parts: Parts,
    editor: AbstractAnyEditor[Any] | None,
    stats: StatsConfig | None,
    model: ModelConfig | None,
) -> None:
    """The second moments that an editor needs and others computed, as far as headers tell."""
    if editor is not None and stats is not None and model is not None and editor.needs_moments:
        parts.problems.add_all(lacking(stats, model.label))
        if stats.remote is not None:
            parts.problems.add_all(f"stats.{problem}" for problem in absent(stats.remote))


def check_rollback(parts: Parts, settings: Settings | None, restraints: Restraints | None) -> None:
    """With rollback, updates do not add up, so nothing can restrain the total in the model."""
    if settings is None or restraints is None or not settings.rollback:
        return
    for name, restraint in restraints.totals.items():
        if restraint.apply_at != "evaluation":
            key = f"restraint.{name}.apply_at"
            parts.problems.add(
                message(
                    key,
                    "with rollback=true no total remains in the model",
                    got=restraint.apply_at,
                    expected="'evaluation'",
                    fix=f"set {key}=evaluation or rollback=false",
                )
            )


def check_requests(
    parts: Parts,
    editor: AbstractAnyEditor[Any] | None,
    data: LoadedDataset | None,
    settings: Settings | None,
) -> None:
    """The edit requests that the editor cannot edit. Without requests, what the editor lacks. With
    `known_only` the runner checks them, because which ones are edited is not known yet.
    """
    if editor is None or settings is None:
        return
    problems = editor.lacks()
    if data is not None and not data.known_only:
        problems = editor.check_requests(data, data.requests[: settings.edits])
    parts.problems.add_all(f"editor.{problem}" for problem in problems)


def check_separators(parts: Parts, model: ModelConfig | None, data: LoadedDataset | None) -> None:
    """Separators that a chat template leaves no place for."""
    if model is None or data is None or model.chat_template is None:
        return
    chosen = [request for request in data.requests if request.separator is not None]
    if chosen:
        first = chosen[0]
        parts.problems.add(
            message(
                "dataset.separator",
                "the chat template, and nothing else, stands between a prompt and its target; "
                f"{len(chosen)} requests have a separator (the first is {first.id})",
                got=first.separator,
                expected=f"auto, as model.chat_template={model.chat_template}",
                fix="leave separators out, or set model.chat_template=null",
            )
        )


def checked_suite(
    parts: Parts, suite: AbstractEvaluator | None, model: ModelConfig | None
) -> AbstractEvaluator | None:
    """The suite with the data of its tasks. Missing data is a problem, and so are prompts that
    exceed the model's context length.
    """
    if not isinstance(suite, AbstractSuite):
        return suite
    try:
        positions = model.positions if model is not None else None
        key = ["suite", parts.config["suite"], positions]
        return parts.loads.get(key, lambda: suite.check(positions=positions))
    except ConfigError as error:
        parts.problems.add_all(error.problems)
        return None


def not_writable(folder: Path) -> str | None:
    """Why nothing can be written below `folder`, which may not exist yet. None if it is writable.
    Nothing is written by the check.
    """
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    if not existing.is_dir():
        return f"{existing} is not a folder"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} is not writable"
