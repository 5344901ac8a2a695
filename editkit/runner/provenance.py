"""Where a run's numbers come from: versions, digests, device, time and memory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.files import read_object, write_atomically
from editkit.lazy import torch
from editkit.runner.inputs import of_dataset

if TYPE_CHECKING:
    from editkit.config.experiment import Experiment
    from editkit.runner.plan import Trajectory

PROVENANCE = "provenance.json"
ENVIRONMENT = (
    "git",
    "packages",
    "python",
    "platform",
    "device",
    "threads",
)  # what may change the last bits
PACKAGES = ("editkit", "torch", "transformers", "tokenizers", "numpy", "safetensors", "hydra-core")


def environment(device: torch.device) -> dict[str, Any]:
    """The program and the machine; the host's name is left out on purpose, runs are shared."""
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
        "command": sys.argv[1:],
    }


def git_commit() -> str | None:
    """The commit of editkit's source, with "+changes" where the work tree differs; None outside a
    checkout.
    """
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
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


def peak_memory_bytes(device: torch.device) -> dict[str, int]:
    """The most that this process has held so far."""
    peak = {
        "host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
    }
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def describe(experiment: Experiment, job: Trajectory) -> dict[str, Any]:
    """The provenance as far as it is known before the first edit."""
    return environment(job.model.device) | {
        "model": {
            "name": job.model.name,
            "fingerprint": job.model.fingerprint,
            "dtype": str(job.model.dtype).removeprefix("torch."),
        },
        "dataset": experiment.data.provenance(),
        "requests": [request.id for request in job.requests],
        "evaluated": job.evaluated(),
        "statistics": job.moments.digests,
        "editor": dict(experiment.editor.provenance()),
        "seed": experiment.seed,
    }


def save_provenance(
    folder: Path, provenance: dict[str, Any], *, seconds: float, job: Trajectory, num_lost: int
) -> None:
    """Writes what was known before the first edit, and what this session took, added to earlier
    ones.
    """
    before = read_provenance(folder)
    peaks = job.peaks.bytes
    whole, key = (
        peak_memory_bytes(job.model.device),
        "device" if job.model.device.type == "cuda" else "host",
    )
    whole[key] = max(
        whole[key], *peaks.values()
    )  # noting phases begins the process's own count anew
    # A run that was cut off may have gone on elsewhere: of earlier sessions stands here what the
    # next one had another of.
    changed = {
        key: before[key] for key in ENVIRONMENT if key in before and before[key] != provenance[key]
    }
    measured = {
        "earlier_sessions": [*before.get("earlier_sessions", []), *([changed] if changed else [])],
        **added_up(before, seconds=seconds, num_lost=num_lost),
        "peak_memory_bytes": whole,
        "peak_memory_bytes_by_phase": peaks,  # of the last session
    }
    write_atomically(folder / PROVENANCE, json.dumps(provenance | measured, indent=1).encode())


def added_up(before: dict[str, Any], *, seconds: float, num_lost: int) -> dict[str, Any]:
    """Wall time, sessions and steps that were made again, over the parts of a run or training that
    was cut off.
    """
    return {
        "wall_seconds": round(before.get("wall_seconds", 0.0) + seconds, 3),
        "sessions": before.get("sessions", 0) + 1,
        "steps_made_again": before.get("steps_made_again", 0) + num_lost,
    }


def read_provenance(folder: Path) -> dict[str, Any]:
    """What earlier sessions of a run wrote of themselves; empty where that is not there or cannot
    be read.
    """
    return read_object(folder / PROVENANCE)


def recorded_dataset(folder: Path) -> dict[str, str] | None:
    """What a run's dataset was, as inputs; None where its provenance does not say."""
    dataset = read_provenance(folder).get("dataset")
    return of_dataset(dataset) if isinstance(dataset, dict) and "digest" in dataset else None
