"""Where a run's numbers come from: versions, digests, device, time and memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from editkit.lazy import torch

PACKAGES = ("editkit", "torch", "transformers", "tokenizers", "numpy", "safetensors", "hydra-core")


def environment(device: torch.device) -> dict[str, Any]:
    """The program and the machine; the host's name is left out on purpose, runs are shared."""
    return {
        "git": git_commit(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),  # a launcher's slot
        "threads": torch.get_num_threads(),
        "command": sys.argv[1:],
    }


def git_commit() -> str | None:
    """The commit of editkit's source, with "+changes" where the work tree differs; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", str(Path(__file__))) is None:
        return None  # an installed copy that happens to lie inside somebody else's repository
    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit


def peak_memory_bytes(device: torch.device) -> dict[str, int]:
    """The most that this process has held so far."""
    peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak
