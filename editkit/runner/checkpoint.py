"""How far a run has come, as a value and as a file.

A checkpoint is one safetensors file, written under a temporary name and renamed, and `latest.json`,
which names it with its SHA-256 and says how long the record files were at that moment. Whatever
happens in between, `latest.json` points at a whole checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError
from editkit.files import write_atomically
from editkit.lazy import torch
from editkit.linalg.spectral import Spectrum
from editkit.linalg.total import Total
from editkit.types import TensorState

LATEST = "latest.json"
POINTER = {"file": str, "sha256": str, "step": int, "record_bytes": dict}  # what it holds
KEPT = 2  # checkpoints that stay on disk: the newest, and one to go back to by hand


@dataclass(frozen=True, kw_only=True)
class RunState:
    """All that the next step depends on, besides the base model and the configuration."""

    step: int
    totals: Mapping[str, Total]  # by module
    contexts: tuple[str, ...]
    editor: TensorState
    solve: TensorState  # of the restraint on the solve
    baselines: Mapping[str, TensorState]  # what the unedited model answered, by evaluator
    spectra: Mapping[str, Spectrum]  # where the next spectrum starts from, by module
    base_sigma_max: Mapping[str, float]  # sigma_max(W_0), by module
    rng: TensorState  # of torch's global generators
    inputs: Mapping[str, str] = field(
        default_factory=dict
    )  # digests of what the run reads besides its configuration
    before_end: Mapping[str, Total] = field(
        default_factory=dict
    )  # the totals before a restraint was put in at the end; empty until then


def generator_states() -> TensorState:
    """The states of torch's global generators, by device."""
    states = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_initialized():
        states |= {
            f"cuda:{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())
        }
    return states


def restore_generators(states: TensorState) -> None:
    """Puts torch's global generators back where they were; those of GPUs that this machine has not
    are left out.
    """
    there = {f"cuda:{index}" for index in range(torch.cuda.device_count())}
    for device, state in states.items():
        if device == "cpu":
            torch.random.set_rng_state(state)
        elif device in there:
            torch.cuda.set_rng_state(state, device)


def save_state(state: RunState, folder: Path, record_bytes: Mapping[str, int]) -> None:
    """Writes a checkpoint into `folder` (a run's `state/`); `record_bytes` are the lengths of the
    record files up to it.
    """
    from safetensors.torch import save

    groups: dict[str, TensorState] = {
        "editor": state.editor,
        "solve": state.solve,
        "rng": state.rng,
    }
    groups |= {f"total/{module}": total.state() for module, total in state.totals.items()}
    groups |= {f"before_end/{module}": total.state() for module, total in state.before_end.items()}
    groups |= {f"spectrum/{module}": spectrum.state() for module, spectrum in state.spectra.items()}
    groups |= {f"baseline/{name}": tensors for name, tensors in state.baselines.items()}
    named = {
        f"{group}|{name}": tensor
        for group, items in groups.items()
        for name, tensor in items.items()
    }
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in named.items()
    }  # safetensors refuses shared storage
    facts = {
        "step": state.step,
        "contexts": state.contexts,
        "modules": {module: total.shape for module, total in state.totals.items()},
        "evaluators": list(state.baselines),
        "base_sigma_max": dict(state.base_sigma_max),
        "inputs": dict(state.inputs),
        "before_end": list(state.before_end),
    }
    payload = save(tensors, metadata={"editkit": json.dumps(facts)})
    name = f"step-{state.step:08d}.safetensors"
    write_atomically(folder / name, payload)
    pointer = {
        "file": name,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "step": state.step,
        "record_bytes": dict(record_bytes),
    }
    write_atomically(folder / LATEST, json.dumps(pointer, indent=1).encode())
    for old in sorted(folder.glob("step-*.safetensors"))[:-KEPT]:
        old.unlink()


def read_pointer(folder: Path) -> dict[str, Any] | None:
    """What `latest.json` says, or None where no checkpoint was made. Raises ConfigError if it
    cannot be read.
    """
    path = folder / LATEST
    if not path.exists():
        return None
    try:
        pointer = json.loads(path.read_text())
        found = {key: pointer[key] for key in POINTER}
        if wrong := [key for key, kind in POINTER.items() if type(found[key]) is not kind]:
            raise TypeError(f"{wrong[0]} is {found[wrong[0]]!r}")
        if any(type(length) is not int or length < 0 for length in found["record_bytes"].values()):
            raise TypeError(f"record_bytes is {found['record_bytes']!r}")
        return found
    except (
        ValueError,
        KeyError,
        TypeError,
    ) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ConfigError(
            f"corrupt checkpoint: {path} cannot be read ({error}). Start anew with resume=never."
        ) from None


def load_state(folder: Path) -> RunState:
    """The newest checkpoint of a run's `state/` folder. Raises ConfigError where there is none or
    its checksum does not hold.
    """
    from safetensors import safe_open
    from safetensors.torch import load

    pointer = read_pointer(folder)
    if pointer is None:
        raise ConfigError(f"no checkpoint in {folder}: the run has not saved its state yet.")
    path = folder / pointer["file"]
    payload = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(payload).hexdigest() != pointer["sha256"]:
        fault = "is missing" if not payload else "does not match its checksum"
        raise ConfigError(
            f"corrupt checkpoint: {path} {fault}. Restore the file, or start anew with resume=never."
        )
    with safe_open(path, framework="pt") as opened:
        facts = json.loads(opened.metadata()["editkit"])
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load(payload).items():
        group, _, name = key.partition("|")
        groups.setdefault(group, {})[name] = tensor

    def totals(module: str, group: str) -> Total:
        return Total.from_state(
            tuple(facts["modules"][module]), groups.get(f"{group}/{module}", {})
        )

    return RunState(
        step=facts["step"],
        totals={module: totals(module, "total") for module in facts["modules"]},
        contexts=tuple(facts["contexts"]),
        editor=groups.get("editor", {}),
        solve=groups.get("solve", {}),
        baselines={name: groups.get(f"baseline/{name}", {}) for name in facts["evaluators"]},
        spectra={
            module: Spectrum.from_state(groups[f"spectrum/{module}"]) for module in facts["modules"]
        },
        base_sigma_max=facts["base_sigma_max"],
        rng=groups["rng"],
        inputs=facts.get("inputs", {}),  # earlier versions of editkit noted neither
        before_end={module: totals(module, "before_end") for module in facts.get("before_end", ())},
    )
