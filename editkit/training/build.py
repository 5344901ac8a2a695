"""From a composed configuration to a checked training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.config.build import folder_name, memory_demand
from editkit.config.checks import check_combination
from editkit.config.experiment import Settings
from editkit.config.identity import config_hash
from editkit.config.parts import Parts
from editkit.datasets.base import AbstractDataset, LoadedDataset
from editkit.editors.base import AbstractEditor
from editkit.editors.mend import Mend
from editkit.hypernet.examples import Split, split
from editkit.model.load import ModelConfig
from editkit.records.tracker import AbstractTracker
from editkit.resources.footprint import Demand
from editkit.resources.runtime import Runtime

KEPT = (
    "model",
    "editor",
    "dataset",
    "tracker",
    "runtime",
    "recipe",
    *Settings.__dataclass_fields__,
)  # of the configuration


@dataclass(frozen=True, kw_only=True)
class Training:
    """What `editkit.training.session.train` does."""

    model: ModelConfig
    editor: Mend
    data: LoadedDataset
    split: Split
    tracker: AbstractTracker
    runtime: Runtime
    settings: Settings
    name: str
    folder: Path  # outputs/<experiment_name>/<model>-<editor>-training-<hash>/seed<k>
    config: Mapping[str, Any]  # resolved, plain values
    demand: Demand  # the parts that memory depends on


def build_training(config: Any, *, choices: Mapping[str, Any] | None = None) -> Training:
    """The training that a configuration describes; its suite, restraints and edits play no part.
    Raises ConfigError with all problems.
    """
    parts = Parts(config, choices)
    settings, model, editor = (
        parts.settings(),
        parts.one("model", ModelConfig),
        parts.one("editor", AbstractEditor),
    )
    dataset, tracker, runtime = (
        parts.one("dataset", AbstractDataset),
        parts.one("tracker", AbstractTracker),
        parts.one("runtime", Runtime),
    )
    if editor is not None and not isinstance(editor, Mend):
        parts.problems.add(
            f"editor={parts.name_of('editor')} has nothing to train; editor=mend has."
        )
    if settings is not None:
        check_combination(parts, settings, editor, None)
        # How many edits a run makes is no matter here.
        data = parts.load(dataset, _with_edits(settings, 1))
    else:
        data = None
    parts.finish()
    assert settings and model and isinstance(editor, Mend) and data and tracker and runtime
    options = editor.train
    divided = split(
        data.requests,
        held_apart=options.held_apart,
        validation=options.validation,
        least=options.accumulate,
        seed=settings.seed,
    )
    name = settings.name or folder_name(f"{model.label}-{parts.name_of('editor')}-training")
    kept = {key: value for key, value in parts.config.items() if key in KEPT} | {"name": name}
    trained = {
        key: value
        for key, value in parts.config["editor"].items()
        if key not in ("hypernetwork", "step_scale")
    }
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


def _with_edits(settings: Settings, edits: int) -> Settings:
    from dataclasses import replace

    return replace(settings, edits=edits, milestones=None)
