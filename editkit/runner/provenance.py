"""The provenance of a run's numbers: versions, digests, device, time and memory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.datasets.base import LoadedDataset
from editkit.files import read_object, write_atomically
from editkit.lazy import SPIN_COUNT, WAIT_POLICY, torch
from editkit.runner.inputs import of_dataset

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

PROVENANCE = "provenance.json"
# the keys whose values may change the last bits
ENVIRONMENT = ("git", "packages", "python", "platform", "device", "threads")
PACKAGES = ("editkit", "torch", "transformers", "tokenizers", "numpy", "safetensors", "hydra-core")


def describe(model: EditableModel, data: LoadedDataset) -> dict[str, Any]:
    """The facts that runs and trainings share: program, machine, model and dataset."""
    chat = {} if model.chat is None else {"chat_template": model.chat.label}
    return environment(model.device) | {
        "model": {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        | chat,
        "dataset": data.provenance(),
    }


def environment(device: torch.device) -> dict[str, Any]:
    """The program and the machine. The host's name is left out on purpose: runs are shared."""
    return {
        "git": git_commit(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),  # a launcher's slot
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get(WAIT_POLICY),  # of these threads
        "spin_count": os.environ.get(SPIN_COUNT),
        "command": sys.argv[1:],
    }


def git_commit() -> str | None:
    """The commit of editkit's source, with "+changes" if the work tree differs from it; None
    outside a checkout.
    """
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                # Without optional locks: a killed `git status` would leave the user's index locked.
                ["git", "--no-optional-locks", "-C", str(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", str(Path(__file__))) is None:
        return None  # an installed copy that happens to lie inside somebody else's repository
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit


def peak_memory_bytes(device: torch.device, peaks: Mapping[str, int]) -> dict[str, int]:
    """The most memory that this process has held so far, on the host and on a GPU.

    Args:
        peaks: the peak of each phase. Noting a phase restarts the process's own count.
    """
    peak = {
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
    }
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    key = "device" if device.type == "cuda" else "host"
    peak[key] = max([peak[key], *peaks.values()])
    return peak


def save_provenance(
    folder: Path,
    provenance: Mapping[str, Any],
    *,
    model_files: str | None,
    seconds: float,
    num_lost: int,
    measured: Mapping[str, Any],
) -> None:
    """Writes provenance.json: `provenance` with the digest of the model's files, the time of all
    sessions with the number of steps that had to be repeated, then `measured`.
    """
    model = provenance["model"] | {"files": model_files}
    before = read_provenance(folder)
    sums = {
        "wall_seconds": round(before.get("wall_seconds", 0.0) + seconds, 3),
        "sessions": before.get("sessions", 0) + 1,
        "steps_made_again": before.get("steps_made_again", 0) + num_lost,
    }
    content = {**provenance, "model": model, **sums, **measured}
    write_atomically(folder / PROVENANCE, json.dumps(content, indent=1).encode())


def earlier_sessions(folder: Path, now: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The environments of earlier sessions, each reduced to the values that differed from the
    session after it. `now` is the environment of this session.
    """
    before = read_provenance(folder)
    changed = {key: before[key] for key in ENVIRONMENT if key in before and before[key] != now[key]}
    return [*before.get("earlier_sessions", []), *([changed] if changed else [])]


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance that earlier sessions wrote; empty if it is missing or cannot be read."""
    return read_object(folder / PROVENANCE)


def recorded_dataset(folder: Path) -> dict[str, str] | None:
    """The dataset of earlier sessions as inputs; None if their provenance does not name it."""
    dataset = read_provenance(folder).get("dataset")
    return of_dataset(dataset) if isinstance(dataset, dict) and "digest" in dataset else None
