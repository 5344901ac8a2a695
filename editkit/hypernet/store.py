"""A trained hypernetwork as a file: safetensors, with what it was made for and from in the header.

The header names the model by its fingerprint and says which requests were trained on, by the digest
of the dataset with their ids, and by a digest of each prompt: a run that would edit one of them is
refused, also where another file holds it under another id.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.errors import OptionError, message
from editkit.files import written_atomically
from editkit.hypernet.network import Hypernetwork, NetworkOptions
from editkit.lazy import torch
from editkit.types import EditRequest

FILE = "hypernetwork.safetensors"
ASSET = "asset:"
FORMAT = 1
SHOWN = 5  # ids that an error names


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of its hypernetwork."""

    model: str  # its name
    fingerprint: str
    modules: Mapping[str, tuple[int, int]]  # (O, I), in order
    network: Mapping[str, Any]  # NetworkOptions
    dataset: str  # digest of what was trained on
    trained: tuple[str, ...]  # ids of the requests that were trained on or chose when to stop
    prompts: frozenset[str]  # digests of their prompts
    facts: Mapping[str, Any]  # how it was trained and what it reached, for people

    def leaks(self, requests: Sequence[EditRequest], digest: str) -> list[str]:
        """Ids of the requests that this hypernetwork has seen; `digest` is that of the dataset they
        come from.
        """
        ids = set(self.trained) if digest == self.dataset else set()
        return [
            request.id
            for request in requests
            if request.id in ids or prompt_digest(request) in self.prompts
        ]


def prompt_digest(request: EditRequest) -> str:
    """Twelve hexadecimal digits."""
    return hashlib.sha256(request.full_prompt.encode()).hexdigest()[:12]


def resolve(path: str) -> Path:
    """The file that `editor.hypernetwork` names: a file, a folder that holds one, or "asset:..."
    for one that comes with the package.
    """
    found = Path(path).expanduser()
    if path.startswith(ASSET):
        found = (
            Path(str(importlib.resources.files("editkit"))) / "assets" / path.removeprefix(ASSET)
        )
    return found / FILE if found.is_dir() else found


def save_hypernetwork(
    path: Path,
    network: Hypernetwork,
    *,
    model: str,
    fingerprint: str,
    dataset: str,
    trained: Iterable[EditRequest],
    facts: Mapping[str, Any],
) -> None:
    """Writes it, whole or not at all."""
    from safetensors.torch import save_file

    seen = list(trained)
    header = {
        "format": FORMAT,
        "model": model,
        "fingerprint": fingerprint,
        "modules": {module: list(shape) for module, shape in network.shapes.items()},
        "network": dataclasses.asdict(network.options),
        "dataset": dataset,
        "trained": [request.id for request in seen],
        "prompts": sorted({prompt_digest(request) for request in seen}),
        "facts": dict(facts),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.tensors.items()}
    with written_atomically(path) as temporary:
        save_file(tensors, temporary, metadata={"editkit": json.dumps(header)})


def read_header(path: str) -> Header:
    """The header of the file; the weights are not read.

    Raises:
        OptionError: there is no such file, or it is not a hypernetwork of editkit.
    """
    file = resolve(path)
    if not file.is_file():
        fix = "train one with `editkit train editor=mend model=... dataset=...`"
        raise OptionError(message("hypernetwork", f"there is no file {file}", got=path, fix=fix))
    try:
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            found = json.loads(
                json.loads(opened.read(min(length, file.stat().st_size)))["__metadata__"]["editkit"]
            )
        assert found["format"] == FORMAT
        return Header(
            model=found["model"],
            fingerprint=found["fingerprint"],
            modules={
                module: (int(rows), int(columns))
                for module, (rows, columns) in found["modules"].items()
            },
            network=found["network"],
            dataset=found["dataset"],
            trained=tuple(found["trained"]),
            prompts=frozenset(found["prompts"]),
            facts=found["facts"],
        )
    except (ValueError, KeyError, TypeError, AssertionError, MemoryError) as error:
        problem = f"{file} is not a hypernetwork of editkit ({type(error).__name__}: {error})"
        raise OptionError(message("hypernetwork", problem)) from None


def load_hypernetwork(
    path: str, *, device: torch.device | str = "cpu"
) -> tuple[Hypernetwork, Header]:
    """The hypernetwork and the header of its file. Raises OptionError for an unreadable file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    header = read_header(path)
    try:
        tensors = load_file(resolve(path), device=str(device))
    except SafetensorError as error:
        raise OptionError(
            message("hypernetwork", f"cannot read {resolve(path)} ({error})")
        ) from None
    return Hypernetwork(
        shapes=header.modules, options=NetworkOptions(**header.network), tensors=tensors
    ), header
