"""How far a training has come, as a file: like a run's checkpoint, and pointed at by the same
`latest.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from editkit.errors import ConfigError
from editkit.files import file_digest, write_atomically, written_atomically
from editkit.hypernet.learner import LearningState
from editkit.lazy import torch
from editkit.runner.checkpoint import KEPT, LATEST, read_pointer
from editkit.types import TensorState

GROUPS = ("network", "adam", "chains", "best")


def save_learning(
    state: LearningState,
    folder: Path,
    record_bytes: Mapping[str, int],
    *,
    inputs: Mapping[str, str] | None = None,
) -> None:
    """Writes a checkpoint into `folder`; `record_bytes` are the lengths of the record files up to
    it, `inputs` as in `editkit.runner.inputs`.
    """
    from safetensors.torch import save_file

    tensors = {
        f"{group}|{name}": tensor.detach().cpu().contiguous()
        for group in GROUPS
        for name, tensor in getattr(state, group).items()
    }
    facts = {
        "step": state.step,
        "best_step": state.best_step,
        "best_loss": state.best_loss,
        "inputs": dict(inputs or {}),
    }
    name = f"step-{state.step:08d}.safetensors"
    with written_atomically(folder / name) as temporary:
        save_file(
            tensors, temporary, metadata={"editkit": json.dumps(facts)}
        )  # as bytes it would be in memory twice more
    pointer = {
        "file": name,
        "sha256": file_digest(folder / name),
        "step": state.step,
        "record_bytes": dict(record_bytes),
    }
    write_atomically(folder / LATEST, json.dumps(pointer, indent=1).encode())
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink()


def load_learning(folder: Path) -> LearningState | None:
    """The newest checkpoint, or None where there is none. Raises ConfigError where its checksum
    does not hold.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    pointer = read_pointer(folder)
    if pointer is None:
        return None
    path = folder / pointer["file"]
    if not path.exists() or file_digest(path) != pointer["sha256"]:
        fault = "is missing" if not path.exists() else "does not match its checksum"
        raise ConfigError(
            f"corrupt checkpoint: {path} {fault}. Restore the file, or start anew with resume=never."
        )
    with safe_open(path, framework="pt") as opened:
        facts = json.loads(opened.metadata()["editkit"])
    groups: dict[str, dict[str, torch.Tensor]] = {group: {} for group in GROUPS}
    for key, tensor in load_file(path).items():
        group, _, name = key.partition("|")
        groups[group][name] = tensor
    parts: dict[str, TensorState] = dict(groups)
    return LearningState(
        step=facts["step"], best_step=facts["best_step"], best_loss=facts["best_loss"], **parts
    )


def saved_inputs(folder: Path) -> dict[str, str]:
    """The inputs of the training that wrote the newest checkpoint, which must be a sound one."""
    from safetensors import safe_open

    pointer = read_pointer(folder)
    assert pointer is not None
    with safe_open(folder / pointer["file"], framework="pt") as opened:
        return dict(json.loads(opened.metadata()["editkit"]).get("inputs", {}))
