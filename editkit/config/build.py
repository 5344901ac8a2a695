"""From a composed configuration to a checked `Experiment`. All problems are reported together,
before a model is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editkit.config.checks import (
    check_combination,
    check_imported,
    check_model,
    check_requests,
    check_rollback,
    check_separators,
    checked_suite,
)
from editkit.config.experiment import Experiment, Settings, demand_of
from editkit.config.identity import config_hash
from editkit.config.loads import Loads
from editkit.config.parts import PARTS, Parts
from editkit.datasets.base import AbstractDataset
from editkit.editors.base import AbstractAnyEditor
from editkit.evaluation.base import AbstractEvaluator
from editkit.model.load import ModelConfig
from editkit.records.tracker import AbstractTracker
from editkit.resources.footprint import Demand
from editkit.resources.runtime import Runtime
from editkit.stats.corpus import StatsConfig


def build(
    config: Any, *, choices: Mapping[str, Any] | None = None, loads: Loads | None = None
) -> Experiment:
    """The experiment that a configuration describes.

    Args:
        config: an OmegaConf configuration or plain values; not modified.
        choices: the chosen option by group, for messages only.
        loads: datasets and suites that other configurations have read.

    Raises:
        ConfigError: with all problems.
    """
    parts = Parts(config, choices, loads)
    settings = parts.settings()
    model, editor = parts.one("model", ModelConfig), parts.one("editor", AbstractAnyEditor)
    stats, restraints = parts.one("stats", StatsConfig), parts.restraints()
    dataset, suite = parts.one("dataset", AbstractDataset), parts.one("suite", AbstractEvaluator)
    (editing, measuring), tracker = parts.evaluation(), parts.one("tracker", AbstractTracker)
    runtime = parts.one("runtime", Runtime)
    check_combination(parts, settings, editor, stats)
    check_model(parts, model)
    check_imported(parts, editor, stats, model)
    check_rollback(parts, settings, restraints)
    data = parts.load(dataset, settings)
    check_requests(parts, editor, data, settings)
    check_separators(parts, model, data)
    suite = checked_suite(parts, suite, model)
    parts.finish()
    assert settings and model and editor and stats and restraints
    assert data and suite and editing and measuring and tracker and runtime
    place = place_of(parts, settings, model)
    return Experiment(
        name=place.config["name"],
        model=model,
        editor=editor,
        restraints=restraints,
        data=data,
        evaluation=editing,
        measuring=measuring,
        evaluators=editing.evaluators() | {"suite": suite},
        stats=stats,
        solve=settings.solve,
        tracker=tracker,
        runtime=runtime,
        schedule=replace(settings.schedule, measures_last="final" in measuring.timings),
        seed=settings.seed,
        rollback=settings.rollback,
        resume=settings.resume,
        retry_failed=settings.retry_failed,
        when_locked=settings.when_locked,
        on_collapse=settings.on_collapse,
        folder=place.folder,
        config=place.config,
        ledger=settings.ledger,
    )


@dataclass(frozen=True, kw_only=True)
class Place:
    """The folder of a run, and what follows from its configuration without reading any data."""

    folder: Path  # outputs/<experiment_name>/<name>-<hash>/seed<k>
    config: Mapping[str, Any]  # resolved, plain values
    settings: Settings
    totals: tuple[str, ...]  # the names of the restraints that are views of the run's trajectory


def locate(config: Any, *, choices: Mapping[str, Any] | None = None) -> Place:
    """The folder that the run of a configuration writes to. Everything that `build` checks is
    checked, except the contents of the dataset and of the suite, which are not read.

    Raises:
        ConfigError: with all problems.
    """
    parts = Parts(config, choices)
    settings = parts.settings()
    model, editor = parts.one("model", ModelConfig), parts.one("editor", AbstractAnyEditor)
    restraints = parts.restraints()
    for key, expected in PARTS.items():
        if key not in ("model", "editor", "restraint", "stats"):
            parts.one(key, expected)
    parts.evaluation()
    check_combination(parts, settings, editor, parts.one("stats", StatsConfig))
    if editor is not None:
        parts.problems.add_all(f"editor.{problem}" for problem in editor.lacks())
    parts.finish()
    assert settings and model and restraints
    views = tuple(
        name for name, restraint in restraints.totals.items() if restraint.apply_at == "evaluation"
    )
    return place_of(parts, settings, model, views)


def place_of(
    parts: Parts, settings: Settings, model: ModelConfig, totals: tuple[str, ...] = ()
) -> Place:
    """The place of a run of these parts. Its folder is named after what can change the results."""
    editor = parts.name_of("editor")
    # The restraint that an editor brings along (d4s, alphaedit) comes first.
    restraints = "+".join(sorted(parts.config["restraint"], key=lambda name: name != editor))
    name = settings.name or folder_name(f"{model.label}-{editor}-{restraints or 'none'}")
    resolved = parts.config | {"name": name, "milestones": list(settings.schedule.milestones)}
    folder = (
        Path(settings.paths.outputs).expanduser()
        / settings.experiment_name
        / f"{name}-{config_hash(resolved)}"
        / f"seed{settings.seed}"
    )
    return Place(folder=folder, config=resolved, settings=settings, totals=totals)


def model_and_stats(
    config: Any, *, choices: Mapping[str, Any] | None = None
) -> tuple[ModelConfig, AbstractAnyEditor[Any], StatsConfig, Runtime]:
    """The parts of a configuration that second moments depend on, checked like those of `build`."""
    parts = Parts(config, choices)
    model, editor = parts.one("model", ModelConfig), parts.one("editor", AbstractAnyEditor)
    stats, runtime = parts.one("stats", StatsConfig), parts.one("runtime", Runtime)
    parts.finish()
    assert model and editor and stats and runtime
    return model, editor, stats, runtime


def memory_demand(config: Any, *, choices: Mapping[str, Any] | None = None) -> Demand:
    """The parts of a configuration that memory depends on. Dataset and suite are not read.

    Raises:
        ConfigError: with all problems of these parts.
    """
    parts = Parts(config, choices)
    settings, runtime = parts.settings(), parts.one("runtime", Runtime)
    model, editor = parts.one("model", ModelConfig), parts.one("editor", AbstractAnyEditor)
    restraints, stats = parts.restraints(), parts.one("stats", StatsConfig)
    evaluation, _ = parts.evaluation()
    parts.finish()
    assert settings and runtime and model and editor and restraints and stats and evaluation
    return demand_of(
        model=model,
        editor=editor,
        restraints=restraints,
        stats=stats,
        solve=settings.solve,
        runtime=runtime,
        evaluation=evaluation,
        edits=settings.edits,
        batch_size=settings.batch_size,
    )


def folder_name(text: str) -> str:
    """The text with the characters that a folder's name must not have replaced by dashes."""
    return re.sub(r"[^\w.+=-]+", "-", text)
