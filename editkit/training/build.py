"""From a composed configuration to a checked training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from editkit.config.build import folder_name, memory_demand
from editkit.config.checks import check_combination, check_separators
from editkit.config.experiment import Settings
from editkit.config.identity import config_hash
from editkit.config.parts import Parts
from editkit.datasets.base import AbstractDataset, LoadedDataset
from editkit.editors.base import AbstractAnyEditor
from editkit.editors.hypernetwork import AbstractHypernetEditor
from editkit.editors.serac import Serac
from editkit.errors import message
from editkit.hypernet.examples import Split, split
from editkit.hypernet.store import PAIR, RIDGE, Kind
from editkit.model.load import ModelConfig
from editkit.records.tracker import AbstractTracker
from editkit.resources.footprint import Demand
from editkit.resources.runtime import Runtime

# the keys of the configuration that config.yaml keeps
KEPT = (
    *("model", "editor", "dataset", "tracker", "runtime", "recipe"),
    *Settings.__dataclass_fields__,
)
# the keys of an editor that a training does not depend on
UNTRAINED = ("hypernetwork", "step_scale", "pair", "threshold", "cosine", "mixture")
Trainable = AbstractHypernetEditor[Any, Any] | Serac


@dataclass(frozen=True, kw_only=True)
class Training:
    """A checked training: everything that it needs before a model is loaded."""

    model: ModelConfig
    editor: Trainable
    data: LoadedDataset
    split: Split
    tracker: AbstractTracker
    runtime: Runtime
    settings: Settings
    name: str
    folder: Path  # outputs/<experiment_name>/<model>-<editor>-training-<hash>/seed<k>
    config: Mapping[str, Any]  # resolved, plain values
    demand: Demand  # the parts that memory depends on

    def of(self, data: LoadedDataset) -> Training:
        """The training on other data. Raises ConfigError if it is too little."""
        return replace(self, data=data, split=divide(data, self.editor, seed=self.settings.seed))

    @property
    def kind(self) -> Kind:
        """What its file holds."""
        return PAIR if isinstance(self.editor, Serac) else self.editor.kind

    @property
    def resume(self) -> Literal["auto", "never"]:
        return self.settings.resume

    @property
    def when_locked(self) -> Literal["leave", "wait"]:
        return self.settings.when_locked


def divide(data: LoadedDataset, editor: Trainable, *, seed: int) -> Split:
    """The parts of the dataset, by the editor's options. Raises ConfigError if it is too little."""
    options = editor.train
    batches = 1
    if isinstance(editor, AbstractHypernetEditor) and editor.kind is RIDGE:
        batches = editor.train.sequence  # of a step
    return split(
        data.requests,
        held_apart=options.held_apart,
        validation=options.validation,
        least=options.accumulate * batches,
        seed=seed,
    )


def build_training(config: Any, *, choices: Mapping[str, Any] | None = None) -> Training:
    """The training that a configuration describes. Its suite, restraints and edits are ignored.
    Raises ConfigError with all problems.
    """
    parts = Parts(config, choices)
    settings, model, editor = (
        parts.settings(),
        parts.one("model", ModelConfig),
        parts.one("editor", AbstractAnyEditor),
    )
    dataset, tracker, runtime = (
        parts.one("dataset", AbstractDataset),
        parts.one("tracker", AbstractTracker),
        parts.one("runtime", Runtime),
    )
    if editor is not None and not isinstance(editor, AbstractHypernetEditor | Serac):
        parts.problems.add(
            message(
                "editor",
                "this editor has nothing to train",
                got=parts.name_of("editor"),
                expected="an editor with a hypernetwork, or a pair of models",
                fix="choose editor=mend, malmen, rledit or serac",
            )
        )
    if settings is not None:
        check_combination(parts, settings, editor, None)
        # The number of edits of a run does not matter here.
        data = parts.load(dataset, replace(settings, edits=1, milestones=None))
        check_separators(parts, model, data)
    else:
        data = None
    parts.finish()
    assert settings and model and data and tracker and runtime
    assert isinstance(editor, AbstractHypernetEditor | Serac)
    divided = divide(data, editor, seed=settings.seed)
    name = settings.name or folder_name(f"{model.label}-{parts.name_of('editor')}-training")
    kept = {key: value for key, value in parts.config.items() if key in KEPT} | {"name": name}
    trained = {key: value for key, value in parts.config["editor"].items() if key not in UNTRAINED}
    digits = config_hash(
        {"model": parts.config["model"], "dataset": parts.config["dataset"], "training": trained}
    )
    return Training(
        model=model,
        editor=editor,
        data=data,
        split=divided,
        tracker=tracker,
        runtime=runtime,
        settings=settings,
        name=name,
        folder=Path(settings.paths.outputs).expanduser()
        / settings.experiment_name
        / f"{name}-{digits}"
        / f"seed{settings.seed}",
        config=kept,
        demand=memory_demand(config, choices=choices),
    )
