"""How far a training has come, as a file: like a run's checkpoint, and pointed at by the same `latest.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from editkit.errors import ConfigError
from editkit.files import write_atomically
from editkit.hypernet.learner import LearningState
from editkit.lazy import torch
from editkit.state import KEPT, LATEST, read_pointer
from editkit.types import TensorState

GROUPS = ("network", "adam", "chains", "best")


def save_learning(state: LearningState, folder: Path, record_bytes: Mapping[str, int]) -> None:
    """Writes a checkpoint into `folder`; `record_bytes` are the lengths of the record files up to it."""
    from safetensors.torch import save

    tensors = {
        f"{group}|{name}": tensor.detach().cpu().contiguous().clone() for group in GROUPS for name, tensor in getattr(state, group).items()
    }
    facts = {"step": state.step, "best_step": state.best_step, "best_loss": state.best_loss}
    payload = save(tensors, metadata={"editkit": json.dumps(facts)})
    name = f"step-{state.step:08d}.safetensors"
    write_atomically(folder / name, payload)
    pointer = {"file": name, "sha256": hashlib.sha256(payload).hexdigest(), "step": state.step, "record_bytes": dict(record_bytes)}
    write_atomically(folder / LATEST, json.dumps(pointer, indent=1).encode())
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink()


def load_learning(folder: Path) -> LearningState | None:
    """The newest checkpoint, or None where there is none. Raises ConfigError where its checksum does not hold."""
    from safetensors import safe_open
    from safetensors.torch import load

    pointer = read_pointer(folder)
    if pointer is None:
        return None
    path = folder / pointer["file"]
    payload = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(payload).hexdigest() != pointer["sha256"]:
        fault = "is missing" if not payload else "does not match its checksum"
        raise ConfigError(f"corrupt checkpoint: {path} {fault}. Restore the file, or start anew with resume=never.")
    with safe_open(path, framework="pt") as opened:
        facts = json.loads(opened.metadata()["editkit"])
    groups: dict[str, dict[str, torch.Tensor]] = {group: {} for group in GROUPS}
    for key, tensor in load(payload).items():
        group, _, name = key.partition("|")
        groups[group][name] = tensor
    parts: dict[str, TensorState] = dict(groups)
    return LearningState(step=facts["step"], best_step=facts["best_step"], best_loss=facts["best_loss"], **parts)
