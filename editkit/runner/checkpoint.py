"""Checkpoints: the state of a run or a training as a value and as a file.

A checkpoint is one safetensors file and `latest.json`, which names that file with its SHA-256 and
the lengths of the record files at that step. Both are written under a temporary name and renamed:
`latest.json` always points at a whole checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError, message
from editkit.files import file_digest, write_atomically, written_atomically
from editkit.lazy import torch
from editkit.linalg.spectral import Spectrum
from editkit.linalg.total import Total
from editkit.types import TensorState

LATEST = "latest.json"
POINTER = {"file": str, "sha256": str, "step": int, "record_bytes": dict}  # the types of its keys
KEPT = 2  # checkpoints on disk: the newest, and an earlier one that a person can return to
ANEW = "start anew with resume=never"
# How the keys of notes begin that earlier versions of editkit kept among the baselines.
FORMER_NOTES = ("noted/", "rows/", "current/")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of a checkpoint, for every kind of state."""

    step: int
    groups: Mapping[str, TensorState]  # the name of a group holds no "|"
    facts: Mapping[str, Any]  # JSON values
    record_bytes: Mapping[str, int]  # lengths of the record files, by name

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of the inputs (`editkit.runner.inputs`); earlier versions of editkit wrote
        none.
        """
        return dict(self.facts.get("inputs", {}))


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes a checkpoint into `folder`, the `state/` of a run's or training's folder. Tensors on
    the CPU are written from where they lie, without a copy.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for group, state in checkpoint.groups.items():
        for name, tensor in state.items():
            tensor = tensor.detach().cpu().contiguous()
            if tensor.untyped_storage().data_ptr() in storages:
                tensor = tensor.clone()  # safetensors refuses tensors that share a storage
            storages.add(tensor.untyped_storage().data_ptr())
            tensors[f"{group}|{name}"] = tensor
    facts = {"step": checkpoint.step} | dict(checkpoint.facts)
    name = f"step-{checkpoint.step:08d}.safetensors"
    with written_atomically(folder / name) as temporary:
        save_file(tensors, temporary, metadata={"editkit": json.dumps(facts)})
    pointer = {
        "file": name,
        "sha256": file_digest(folder / name),
        "step": checkpoint.step,
        "record_bytes": dict(checkpoint.record_bytes),
    }
    write_atomically(folder / LATEST, json.dumps(pointer, indent=1).encode())
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink()


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint in `folder`, its tensors on the CPU; None if there is none. Raises
    ConfigError if the file is missing or does not match its checksum.
    """
    from safetensors import safe_open

    pointer = read_pointer(folder)
    if pointer is None:
        return None
    path = folder / pointer["file"]
    if not path.exists() or file_digest(path) != pointer["sha256"]:
        problem = "it does not match its checksum" if path.exists() else "it is missing"
        raise ConfigError(
            message(
                str(path),
                f"corrupt checkpoint, {problem}",
                fix=f"restore the file, or {ANEW}",
            )
        )
    groups: dict[str, dict[str, torch.Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["editkit"])
        for key in file.keys():  # noqa: SIM118 (it is no mapping)
            group, _, name = key.partition("|")
            # A copy: the tensor itself lies in the mapped file, where its address decides how a
            # kernel sums, and with that the last bits.
            groups.setdefault(group, {})[name] = file.get_tensor(key).clone()
    return Checkpoint(
        step=facts["step"], groups=groups, facts=facts, record_bytes=pointer["record_bytes"]
    )


def read_pointer(folder: Path) -> dict[str, Any] | None:
    """The content of `latest.json`; None if there is no checkpoint. Raises ConfigError if it cannot
    be read.
    """
    path = folder / LATEST
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
        pointer = {key: content[key] for key in POINTER}
        if wrong := [key for key, kind in POINTER.items() if type(pointer[key]) is not kind]:
            raise TypeError(f"{wrong[0]} is {pointer[wrong[0]]!r}")
        if any(type(size) is not int or size < 0 for size in pointer["record_bytes"].values()):
            raise TypeError(f"record_bytes is {pointer['record_bytes']!r}")
        return pointer
    # JSONDecodeError and UnicodeDecodeError are ValueErrors.
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            message(str(path), f"corrupt checkpoint, it cannot be read ({error})", fix=ANEW)
        ) from None


@dataclass(frozen=True, kw_only=True)
class RunState:
    """All that the next step depends on, besides the base model and the configuration."""

    step: int
    totals: Mapping[str, Total]  # by module
    contexts: tuple[str, ...]
    editor: TensorState
    solve: TensorState  # of the restraint on the solve
    baselines: Mapping[str, TensorState]  # frozen answers of the unedited model, by evaluator
    spectra: Mapping[str, Spectrum]  # where the next spectrum starts from, by module
    base_sigma_max: Mapping[str, float]  # sigma_max(W_0), by module
    rng: TensorState  # of torch's global generators
    # observations right after each edit, by evaluator; evaluators that note nothing are absent
    notes: Mapping[str, TensorState] = field(default_factory=dict)
    # digests of what the run reads besides its configuration
    inputs: Mapping[str, str] = field(default_factory=dict)
    # the model's shortcuts as their report; earlier versions of editkit compared none
    shortcuts: Mapping[str, Any] = field(default_factory=dict)
    # the totals before a restraint was put in at the end; empty until then
    before_end: Mapping[str, Total] = field(default_factory=dict)

    def checkpoint(self, record_bytes: Mapping[str, int]) -> Checkpoint:
        """The state as the content of a checkpoint."""
        groups: dict[str, TensorState] = {
            "editor": self.editor,
            "solve": self.solve,
            "rng": self.rng,
        }
        groups |= {f"total/{module}": total.state() for module, total in self.totals.items()}
        groups |= {f"before_end/{name}": total.state() for name, total in self.before_end.items()}
        groups |= {f"spectrum/{name}": spectrum.state() for name, spectrum in self.spectra.items()}
        groups |= {f"baseline/{name}": tensors for name, tensors in self.baselines.items()}
        groups |= {f"notes/{name}": tensors for name, tensors in self.notes.items()}
        facts = {
            "contexts": self.contexts,
            "modules": {module: total.shape for module, total in self.totals.items()},
            "evaluators": list(self.baselines),
            "base_sigma_max": dict(self.base_sigma_max),
            "inputs": dict(self.inputs),
            "before_end": list(self.before_end),
        } | ({"shortcuts": dict(self.shortcuts)} if self.shortcuts else {})
        if set(self.spectra) != set(self.totals):  # of matrices beside which something stands
            facts["spectra"] = list(self.spectra)
        return Checkpoint(step=self.step, groups=groups, facts=facts, record_bytes=record_bytes)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> RunState:
        """The inverse of `checkpoint`."""
        facts, groups = checkpoint.facts, checkpoint.groups

        def total(module: str, group: str) -> Total:
            shape = tuple(facts["modules"][module])
            return Total.from_state(shape, groups.get(f"{group}/{module}", {}))

        modules = facts["modules"]
        baselines, notes = _baselines_and_notes(groups, facts["evaluators"])
        return cls(
            step=checkpoint.step,
            totals={module: total(module, "total") for module in modules},
            contexts=tuple(facts["contexts"]),
            editor=groups.get("editor", {}),
            solve=groups.get("solve", {}),
            baselines=baselines,
            notes=notes,
            spectra={
                module: Spectrum.from_state(groups[f"spectrum/{module}"])
                for module in facts.get("spectra", modules)
            },
            base_sigma_max=facts["base_sigma_max"],
            rng=groups["rng"],
            inputs=checkpoint.inputs,
            shortcuts=facts.get("shortcuts", {}),
            before_end={
                module: total(module, "before_end")
                for module in facts.get("before_end", ())  # absent in old checkpoints
            },
        )


def _baselines_and_notes(
    groups: Mapping[str, TensorState], evaluators: Iterable[str]
) -> tuple[dict[str, TensorState], dict[str, TensorState]]:
    """Both by evaluator. Earlier versions of editkit kept notes among the baselines."""
    baselines: dict[str, TensorState] = {}
    notes: dict[str, TensorState] = {}
    for name in evaluators:
        kept = groups.get(f"baseline/{name}", {})
        former = {key: tensor for key, tensor in kept.items() if key.startswith(FORMER_NOTES)}
        baselines[name] = {key: tensor for key, tensor in kept.items() if key not in former}
        if of_evaluator := former | dict(groups.get(f"notes/{name}", {})):
            notes[name] = of_evaluator
    return baselines, notes


def save_state(state: RunState, folder: Path, record_bytes: Mapping[str, int]) -> None:
    """Writes a checkpoint of a run; `record_bytes` are the lengths of the record files up to it."""
    write_checkpoint(state.checkpoint(record_bytes), folder)


def load_state(folder: Path) -> RunState:
    """The newest checkpoint of a run. Raises ConfigError if there is none or it is corrupt."""
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise ConfigError(
            message(
                str(folder),
                "no checkpoint, the run has not saved its state yet",
                fix="run it until its first checkpoint",
            )
        )
    return RunState.from_checkpoint(checkpoint)


def generator_states() -> TensorState:
    """The states of torch's global generators, by device."""
    states = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {
            f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())
        }
    return states


def restore_generators(states: TensorState) -> None:
    """Sets torch's global generators. States of GPUs that this machine lacks are left out."""
    present = {f"cuda:{index}" for index in range(torch.cuda.device_count())}
    for device, state in states.items():
        if device == "cpu":
            torch.random.set_rng_state(state)
        elif device in present:
            torch.cuda.set_rng_state(state, device)
