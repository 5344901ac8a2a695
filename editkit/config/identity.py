"""The identity of an experiment: the configuration hash in the name of a run's folder.

The hash covers every option that can change a result. A configured class enters with its stable
name, so that a run keeps its folder when the file of a class moves.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Options that cannot change a result: names, folders, checkpoints, devices, trackers. The seed has
# its own folder.
UNHASHED = (
    *("name", "experiment_name", "seed", "paths", "checkpoint", "resume", "retry_failed"),
    *("when_locked", "tracker", "runtime", "recipe", "ledger"),
    *("stats.folder", "stats.save_every_s", "stats.remote", "stats.remote_timeout_s"),
    "evaluation.thresholds",
    *("model.device_map", "model.allow_pickle", "editor.train", "editor.trajectory"),
    "restraint.eac.source",
)
# Options added later, with the value that reproduces earlier behaviour. A run with that value keeps
# its folder.
LATER: dict[str, Any] = {
    "model.weights": "pretrained",
    "model.expert": None,
    "model.tokenizer": None,
    "model.chat_template": None,
    "evaluation.specificity": False,
    "restraint.d4s.base": "trajectory",
    "dataset.known_only": False,
    "dataset.separator": "auto",
    "dataset.subject": "required",
    "dataset.occurrence": "first",
    "dataset.facts": None,
    "editor.target.products": "float32",
    "editor.warm_up": 0,
}
# Former paths of configured classes, and where each class is now. The first former path of a class
# is its stable name. A class that moves again gets one more line.
FORMER_PATHS = {
    "editkit.datasets.bundled.WorldDataset": "editkit.datasets.world.WorldDataset",
    "editkit.evaluation.downstream.Suite": "editkit.evaluation.harness.suite.Suite",
    "editkit.evaluation.judge.StringJudge": "editkit.evaluation.protocols.judge.StringJudge",
    "editkit.trackers.wandb.Wandb": "editkit.wandb.tracker.Wandb",
}
TARGET = "_target_"


def current_path(path: str) -> str:
    """The current path of the class at a dotted path."""
    return FORMER_PATHS.get(path, path)


def stable_name(path: str) -> str:
    """The name of a class that does not change when its file moves."""
    now = current_path(path)
    return next((former for former, current in FORMER_PATHS.items() if current == now), now)


def config_hash(config: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of the options that can change a result. 1 and 1.0 are the same."""
    later = tuple(key for key, former in LATER.items() if _value(config, key, former) == former)
    kept = _without(config, (*UNHASHED, *later))
    return hashlib.sha256(json.dumps(canonical(kept), sort_keys=True).encode()).hexdigest()[:8]


def _value(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value at a dotted key."""
    *parents, name = key.split(".")
    for parent in parents:
        config = config.get(parent) or {}
    return config.get(name, default)


def _without(config: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    kept = {}
    for name, value in config.items():
        if name not in keys:
            inner = tuple(
                key.removeprefix(f"{name}.") for key in keys if key.startswith(f"{name}.")
            )
            kept[name] = _without(value, inner) if inner and isinstance(value, Mapping) else value
    return kept


def canonical(value: Any) -> Any:
    """The value that enters the hash: stable names for classes, 1 for 1.0."""
    if isinstance(value, Mapping):
        return {
            name: stable_name(item) if name == TARGET and isinstance(item, str) else canonical(item)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
