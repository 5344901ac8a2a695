"""From a composed configuration to a checked `Experiment`. Everything that is wrong is said at once, before a model is loaded.

No registry: a node's `_target_` names its class, the class's fields are its options. torch is not needed here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from editkit.compose import plain
from editkit.datasets.base import AbstractDataset, LoadedDataset
from editkit.editors.base import AbstractEditor
from editkit.errors import ConfigError
from editkit.evaluation.base import AbstractEvaluator
from editkit.evaluation.editing import EditingEvaluator
from editkit.experiment import Experiment, Runtime, Settings, config_hash
from editkit.model.load import ModelConfig
from editkit.restraints.base import (
    PLACES,
    AbstractObjectiveRestraint,
    AbstractRestraint,
    AbstractSolveRestraint,
    AbstractTotalRestraint,
    AbstractUpdateRestraint,
    Restraints,
)
from editkit.schema import Problems, construct, unknown_option
from editkit.stats.corpus import StatsConfig
from editkit.trackers.base import AbstractTracker

__all__ = ["Experiment", "build", "model_and_stats"]

T = TypeVar("T")

# What a key at the root must describe. `restraint` maps names to nodes; `recipe` says where numbers come from and is not built.
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
    resolved = {"restraint": {}} | plain(config)  # restraint=none leaves nothing behind
    parts = Parts(resolved, choices or {})
    settings = parts.settings()
    model, editor, stats = parts.one("model", ModelConfig), parts.one("editor", AbstractEditor), parts.one("stats", StatsConfig)
    restraints = parts.restraints(editor)
    dataset, suite = parts.one("dataset", AbstractDataset), parts.one("suite", AbstractEvaluator)
    editing, tracker, runtime = (
        parts.one("evaluation", EditingEvaluator),
        parts.one("tracker", AbstractTracker),
        parts.one("runtime", Runtime),
    )
    if stats is not None and stats.source == "none" and editor is not None and editor.needs_moments:
        remedy = "choose stats=world|text|hub (ROME: or editor.covariance=null)"
        parts.problems.add(f"stats=none, but editor={parts.name_of('editor')} needs second moments: {remedy}.")
    limit = editor.max_batch_size if editor is not None else None
    if settings is not None and limit is not None and settings.batch_size > limit:
        parts.problems.add(f"batch_size: {settings.batch_size} was given; editor={parts.name_of('editor')} edits {limit} at a time.")
    data = parts.load(dataset, settings)
    if settings is not None and (obstacle := not_writable(Path(settings.paths.outputs).expanduser())):
        parts.problems.add(f"paths.outputs: {settings.paths.outputs} was given; {obstacle}.")
    parts.finish()
    assert settings and model and editor and stats and restraints and data and suite and editing and tracker and runtime
    name = settings.name or folder_name(f"{model.label}-{parts.name_of('editor')}-{'+'.join(resolved['restraint']) or 'none'}")
    resolved |= {"name": name, "milestones": list(settings.schedule.milestones)}
    run = f"{name}-{config_hash(resolved)}"
    return Experiment(
        name=name,
        model=model,
        editor=editor,
        restraints=restraints,
        data=data,
        evaluators={"editing": editing, "suite": suite} if editing.protocols else {"suite": suite},
        stats=stats,
        tracker=tracker,
        runtime=runtime,
        schedule=settings.schedule,
        seed=settings.seed,
        resume=settings.resume,
        on_collapse=settings.on_collapse,
        folder=Path(settings.paths.outputs).expanduser() / settings.experiment_name / run / f"seed{settings.seed}",
        config=resolved,
    )


def model_and_stats(config: Any, *, choices: Mapping[str, Any] | None = None) -> tuple[ModelConfig, AbstractEditor, StatsConfig, Runtime]:
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
        known = {key: value for key, value in self.config.items() if key in Settings.__dataclass_fields__}
        settings = construct(known, "", Settings, self.problems)
        for problem in settings.problems() if settings is not None else ():
            self.problems.add(problem)
        return settings

    def restraints(self, editor: AbstractEditor | None) -> Restraints | None:
        """The restraints by place; notes those that the editor has no place for."""
        nodes = self.config["restraint"]
        if "_target_" in nodes:
            self.problems.add(
                "restraint: the option's file must put its values under its own name, so that several restraints can be chosen."
            )
            return None
        built = {name: construct(node, f"restraint.{name}", AbstractRestraint, self.problems) for name, node in nodes.items()}
        found = {name: restraint for name, restraint in built.items() if restraint is not None}
        for name, restraint in found.items():
            if editor is not None and restraint.place not in editor.places:
                allowed = ", ".join(place for place in PLACES if place in editor.places) or "nowhere"
                self.problems.add(
                    f"restraint={name} acts on the {restraint.place}; editor={self.name_of('editor')} can be restrained at: {allowed}."
                )
        objectives = {name: each for name, each in found.items() if isinstance(each, AbstractObjectiveRestraint)}
        solves = {name: each for name, each in found.items() if isinstance(each, AbstractSolveRestraint)}
        for place, names in {"objective": list(objectives), "solve": list(solves)}.items():
            if len(names) > 1:
                self.problems.add(f"restraint=[{','.join(names)}] all act on the {place}; it has room for one.")
        return Restraints(
            objective=next(iter(objectives.values()), None),
            solve=next(iter(solves.values()), None),
            updates=tuple(each for each in found.values() if isinstance(each, AbstractUpdateRestraint)),
            totals={name: each for name, each in found.items() if isinstance(each, AbstractTotalRestraint)},
        )

    def load(self, dataset: AbstractDataset | None, settings: Settings | None) -> LoadedDataset | None:
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
            self.problems.add(f"edits: {settings.edits} was given; dataset={self.name_of('dataset')} has {len(data.requests)} requests.")
        return data

    def name_of(self, group: str) -> str:
        """What an option is called: as it was chosen, or as its node says."""
        node = self.config.get(group) or {}
        return str(self._choices.get(group) or node.get("name") or node.get("_target_", "?").rpartition(".")[2].lower())

    def finish(self) -> None:
        """Raises ConfigError if anything was found."""
        unset = list(self.problems.unset)
        missing = []
        if RECIPE not in self.config and (numbers := [key for key in unset if key.startswith("editor.")]):
            unset = [key for key in unset if key not in numbers]
            editor, model = self.name_of("editor"), self.name_of("model")
            asked = self._choices.get(RECIPE) or f"{editor}/{model}"
            what = f"for editor={editor}, model={model}" if asked == f"{editor}/{model}" else asked
            missing.append(f"no recipe {what}: set {', '.join(numbers)}, or take another model's numbers with recipe=<editor>/<model>.")
        missing += [f"{key} is not set: {key}=<value>." for key in unset]
        if found := missing + self.problems.found:
            raise ConfigError(found)


def folder_name(text: str) -> str:
    """The text with what does not belong in a folder's name replaced by dashes."""
    return re.sub(r"[^\w.+=-]+", "-", text)


def not_writable(folder: Path) -> str | None:
    """Why nothing can be written below `folder`, which may not exist yet; None if it can. Writes nothing itself."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    if not existing.is_dir():
        return f"{existing} is not a folder"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} cannot be written to"
