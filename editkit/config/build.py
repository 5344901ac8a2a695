"""From a composed configuration to a checked `Experiment`. Everything that is wrong is said at
once, before a model is loaded.

No registry: a node's `_target_` names its class, the class's fields are its options. torch is not
needed here.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from editkit.config.compose import plain
from editkit.config.experiment import Experiment, Settings, demand_of
from editkit.config.identity import TARGET, config_hash
from editkit.config.schema import Problems, construct, resolve, unknown_option
from editkit.datasets.base import AbstractDataset, LoadedDataset
from editkit.datasets.groups import asked_in_one_batch
from editkit.editors.base import AbstractEditor
from editkit.errors import ConfigError
from editkit.evaluation.base import AbstractEvaluator, AbstractSuite
from editkit.evaluation.editing import EditingEvaluator
from editkit.model.load import ModelConfig
from editkit.records.tracker import AbstractTracker
from editkit.resources.footprint import Demand
from editkit.resources.runtime import Runtime
from editkit.restraints.base import (
    PLACES,
    AbstractObjectiveRestraint,
    AbstractRestraint,
    AbstractSolveRestraint,
    AbstractTotalRestraint,
    AbstractUpdateRestraint,
    Restraints,
)
from editkit.stats.corpus import StatsConfig

__all__ = ["Experiment", "build", "locate", "model_and_stats"]

T = TypeVar("T")

# What a key at the root must describe. `restraint` maps names to nodes; `recipe` says where numbers
# come from and is not built.
PARTS: dict[str, type] = {
    "model": ModelConfig,
    "editor": AbstractEditor,
    "restraint": AbstractRestraint,
    "dataset": AbstractDataset,
    "suite": AbstractEvaluator,
    "tracker": AbstractTracker,
    "stats": StatsConfig,
    "runtime": Runtime,
    "evaluation": EditingEvaluator,
}
RECIPE = "recipe"


def build(config: Any, *, choices: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment that a configuration describes. Raises ConfigError with all problems.

    Args:
        config: an OmegaConf configuration or plain values; not modified.
        choices: which option of each group was taken; only for the wording of errors.
    """
    parts = Parts(
        {"restraint": {}} | plain(config), choices or {}
    )  # restraint=none leaves nothing behind
    settings = parts.settings()
    model, editor, stats = (
        parts.one("model", ModelConfig),
        parts.one("editor", AbstractEditor),
        parts.one("stats", StatsConfig),
    )
    restraints = parts.restraints()
    dataset, suite = parts.one("dataset", AbstractDataset), parts.one("suite", AbstractEvaluator)
    editing, tracker, runtime = (
        parts.one("evaluation", EditingEvaluator),
        parts.one("tracker", AbstractTracker),
        parts.one("runtime", Runtime),
    )
    parts.check_together(settings, editor, stats)
    parts.check_rollback(settings, restraints)
    data = parts.load(dataset, settings)
    parts.check_edits(editor, data, settings)
    parts.check(suite, model)
    parts.finish()
    assert (
        settings
        and model
        and editor
        and stats
        and restraints
        and data
        and suite
        and editing
        and tracker
        and runtime
    )
    place = parts.place(settings, model)
    return Experiment(
        name=place.config["name"],
        model=model,
        editor=editor,
        restraints=restraints,
        data=data,
        evaluation=editing,
        evaluators=editing.evaluators() | {"suite": suite},
        stats=stats,
        solve=settings.solve,
        tracker=tracker,
        runtime=runtime,
        schedule=replace(settings.schedule, measures_last="final" in editing.timings),
        seed=settings.seed,
        rollback=settings.rollback,
        resume=settings.resume,
        retry_failed=settings.retry_failed,
        when_locked=settings.when_locked,
        on_collapse=settings.on_collapse,
        folder=place.folder,
        config=place.config,
    )


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run writes."""

    folder: Path  # outputs/<experiment_name>/<name>-<hash>/seed<k>
    config: Mapping[str, Any]  # resolved, plain values
    settings: Settings
    totals: tuple[str, ...]  # the restraints that are views of the run's trajectory, by name


def locate(config: Any, *, choices: Mapping[str, Any] | None = None) -> Place:
    """Where the run of a configuration writes; checks all that `build` does but what is in the
    dataset and the suite, which are not read.

    Raises ConfigError with all problems.
    """
    parts = Parts({"restraint": {}} | plain(config), choices or {})
    settings, model, editor = (
        parts.settings(),
        parts.one("model", ModelConfig),
        parts.one("editor", AbstractEditor),
    )
    restraints = parts.restraints()
    for key, expected in PARTS.items():
        if key not in ("model", "editor", "restraint", "stats"):
            parts.one(key, expected)
    parts.check_together(settings, editor, parts.one("stats", StatsConfig))
    for problem in editor.lacks() if editor is not None else ():
        parts.problems.add(f"editor.{problem}")
    parts.finish()
    assert settings and model and restraints
    views = tuple(name for name, each in restraints.totals.items() if each.apply_at == "evaluation")
    return parts.place(settings, model, views)


def model_and_stats(
    config: Any, *, choices: Mapping[str, Any] | None = None
) -> tuple[ModelConfig, AbstractEditor[Any], StatsConfig, Runtime]:
    """The parts of a configuration that second moments depend on, checked like those of `build`."""
    parts = Parts(plain(config), choices or {})
    found = (
        parts.one("model", ModelConfig),
        parts.one("editor", AbstractEditor),
        parts.one("stats", StatsConfig),
        parts.one("runtime", Runtime),
    )
    parts.finish()
    model, editor, stats, runtime = found
    assert model and editor and stats and runtime
    return model, editor, stats, runtime


def memory_demand(config: Any, *, choices: Mapping[str, Any] | None = None) -> Demand:
    """The parts of a configuration that memory depends on. Dataset and suite are not read.

    Raises:
        ConfigError: with all problems of these parts.
    """
    parts = Parts({"restraint": {}} | plain(config), choices or {})
    settings, runtime = parts.settings(), parts.one("runtime", Runtime)
    model, editor = parts.one("model", ModelConfig), parts.one("editor", AbstractEditor)
    restraints, stats = parts.restraints(), parts.one("stats", StatsConfig)
    evaluation = parts.one("evaluation", EditingEvaluator)
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


class Parts:
    """A resolved configuration, taken apart piece by piece; what is wrong gathers in `problems`."""

    def __init__(self, config: dict[str, Any], choices: Mapping[str, Any]) -> None:
        self.config = config
        self.problems = Problems()
        self._choices = choices

    def one(self, key: str, expected: type[T]) -> T | None:
        """The object at a root key."""
        return construct(self.config.get(key), key, expected, self.problems)

    def settings(self) -> Settings | None:
        """The root's own values; also looks for keys that no part knows."""
        names = {*Settings.__dataclass_fields__, *PARTS, RECIPE}
        for key in self.config.keys() - names:
            self.problems.add(unknown_option(key, "the configuration", names))
        known = {
            key: value for key, value in self.config.items() if key in Settings.__dataclass_fields__
        }
        settings = construct(known, "", Settings, self.problems)
        for problem in settings.problems() if settings is not None else ():
            self.problems.add(problem)
        return settings

    def editor_class(self) -> type[AbstractEditor[Any]] | None:
        """What an editor can do is known from its class, also where an option of it is wrong."""
        node = self.config.get("editor")
        found = (
            resolve(node[TARGET], "editor", AbstractEditor, self.problems)
            if isinstance(node, Mapping) and TARGET in node
            else None
        )
        return None if found is None or inspect.isabstract(found) else found

    def restraints(self) -> Restraints | None:
        """The restraints by place; notes those that the editor has no place for."""
        nodes = self.config["restraint"]
        if "_target_" in nodes:
            self.problems.add(
                "restraint: the option's file must put its values under its own name, so that several restraints can be chosen."
            )
            return None
        chosen = {
            name: node
            for name, node in nodes.items()
            if not isinstance(node, Mapping) or "_target_" in node
        }
        for name in nodes.keys() - chosen.keys():
            stack = ",".join([*chosen, name])
            self.problems.add(
                f"restraint.{name}: a value was given, but {name} is not chosen - choose it with restraint=[{stack}]."
            )
        built = {
            name: construct(node, f"restraint.{name}", AbstractRestraint, self.problems)
            for name, node in chosen.items()
        }
        found = {name: restraint for name, restraint in built.items() if restraint is not None}
        editor = self.editor_class()
        for name, restraint in found.items():
            if editor is not None and restraint.place not in editor.places:
                allowed = (
                    ", ".join(place for place in PLACES if place in editor.places) or "nowhere"
                )
                self.problems.add(
                    f"restraint={name} acts on the {restraint.place}; editor={self.name_of('editor')} can be restrained at: {allowed}."
                )
        objectives = {
            name: each
            for name, each in found.items()
            if isinstance(each, AbstractObjectiveRestraint)
        }
        solves = {
            name: each for name, each in found.items() if isinstance(each, AbstractSolveRestraint)
        }
        for place, names in {"objective": list(objectives), "solve": list(solves)}.items():
            if len(names) > 1:
                self.problems.add(
                    f"restraint=[{','.join(names)}] all act on the {place}; it has room for one."
                )
        return Restraints(
            objective=next(iter(objectives.values()), None),
            solve=next(iter(solves.values()), None),
            solve_name=next(iter(solves), "solve"),
            updates=tuple(
                each for each in found.values() if isinstance(each, AbstractUpdateRestraint)
            ),
            totals={
                name: each
                for name, each in found.items()
                if isinstance(each, AbstractTotalRestraint)
            },
        )

    def check_together(
        self,
        settings: Settings | None,
        editor: AbstractEditor[Any] | None,
        stats: StatsConfig | None,
    ) -> None:
        """Notes what does not fit together, and an outputs' folder that cannot be written to."""
        if (
            stats is not None
            and stats.source == "none"
            and editor is not None
            and editor.needs_moments
        ):
            remedy = "choose stats=world|text|hub (ROME: or editor.covariance=null)"
            self.problems.add(
                f"stats=none, but editor={self.name_of('editor')} needs second moments: {remedy}."
            )
        kind = self.editor_class()
        device_map = (self.config.get("model") or {}).get("device_map")
        if device_map is not None and kind is not None and not kind.spans_devices:
            self.problems.add(
                f"model.device_map: {device_map} was given; editor={self.name_of('editor')} wants the whole model on one device: null."
            )
        limit = kind.max_batch_size if kind is not None else None
        if settings is not None and limit is not None and settings.batch_size > limit:
            self.problems.add(
                f"batch_size: {settings.batch_size} was given; editor={self.name_of('editor')} edits {limit} at a time."
            )
        if settings is not None and (
            obstacle := not_writable(Path(settings.paths.outputs).expanduser())
        ):
            self.problems.add(f"paths.outputs: {settings.paths.outputs} was given; {obstacle}.")

    def check_rollback(self, settings: Settings | None, restraints: Restraints | None) -> None:
        """Notes restraints that would write into a trajectory which rollback has none of."""
        if settings is not None and restraints is not None and settings.rollback:
            for name, restraint in restraints.totals.items():
                if restraint.apply_at != "evaluation":
                    remedy = f"restraint.{name}.apply_at=evaluation or rollback=false"
                    given = f"restraint.{name}.apply_at: {restraint.apply_at} was given"
                    self.problems.add(f"{given}; with rollback=true no edits add up: {remedy}.")

    def place(self, settings: Settings, model: ModelConfig, totals: tuple[str, ...] = ()) -> Place:
        """Where a run of these parts writes: a folder named by what can change its results."""
        restraints = "+".join(self.config["restraint"]) or "none"
        name = settings.name or folder_name(f"{model.label}-{self.name_of('editor')}-{restraints}")
        resolved = self.config | {"name": name, "milestones": list(settings.schedule.milestones)}
        run = f"{name}-{config_hash(resolved)}"
        folder = (
            Path(settings.paths.outputs).expanduser()
            / settings.experiment_name
            / run
            / f"seed{settings.seed}"
        )
        return Place(folder=folder, config=resolved, settings=settings, totals=totals)

    def load(
        self, dataset: AbstractDataset | None, settings: Settings | None
    ) -> LoadedDataset | None:
        """The requests; notes what is wrong with them, and whether they are too few."""
        if dataset is None or settings is None:
            return None
        try:
            data = dataset.load(settings.seed)
        except ConfigError as error:
            for problem in error.problems:
                self.problems.add(problem)
            return None
        if settings.edits > len(data.requests):
            self.problems.add(
                f"edits: {settings.edits} was given; dataset={self.name_of('dataset')} has {len(data.requests)} requests."
            )
        return (
            asked_in_one_batch(data, batch_size=settings.batch_size) if settings.rollback else data
        )

    def check_edits(
        self,
        editor: AbstractEditor[Any] | None,
        data: LoadedDataset | None,
        settings: Settings | None,
    ) -> None:
        """Notes what keeps the editor from editing these requests."""
        if editor is not None and data is not None and settings is not None:
            for problem in editor.check_requests(data, data.requests[: settings.edits]):
                self.problems.add(f"editor.{problem}")

    def check(self, suite: AbstractEvaluator | None, model: ModelConfig | None) -> None:
        """Reads the data of the suite's tasks; notes what is missing or malformed, and what the
        model is too short for.
        """
        if isinstance(suite, AbstractSuite):
            try:
                suite.check(positions=model.positions if model is not None else None)
            except ConfigError as error:
                for problem in error.problems:
                    self.problems.add(problem)

    def name_of(self, group: str) -> str:
        """What an option is called: as it was chosen, or as its node says."""
        node = self.config.get(group) or {}
        return str(
            self._choices.get(group)
            or node.get("name")
            or node.get("_target_", "?").rpartition(".")[2].lower()
        )

    def finish(self) -> None:
        """Raises ConfigError if anything was found."""
        unset = list(self.problems.unset)
        missing = []
        if RECIPE not in self.config and (
            numbers := [key for key in unset if key.startswith("editor.")]
        ):
            unset = [key for key in unset if key not in numbers]
            editor, model = self.name_of("editor"), self.name_of("model")
            asked = self._choices.get(RECIPE) or f"{editor}/{model}"
            what = f"for editor={editor}, model={model}" if asked == f"{editor}/{model}" else asked
            missing.append(
                f"no recipe {what}: set {', '.join(numbers)}, or take another model's numbers with recipe=<editor>/<model>."
            )
        missing += [f"{key} is not set: {key}=<value>." for key in unset]
        if found := missing + self.problems.found:
            raise ConfigError(found)


def folder_name(text: str) -> str:
    """The text with what does not belong in a folder's name replaced by dashes."""
    return re.sub(r"[^\w.+=-]+", "-", text)


def not_writable(folder: Path) -> str | None:
    """Why nothing can be written below `folder`, which may not exist yet; None if it can. Writes
    nothing itself.
    """
    existing = next(
        each for each in (folder.absolute(), *folder.absolute().parents) if each.exists()
    )
    if not existing.is_dir():
        return f"{existing} is not a folder"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written to"
