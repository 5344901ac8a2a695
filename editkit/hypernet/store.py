"""The safetensors file of what an editor was trained: MEND's hypernetwork, SERAC's pair of models.
Its header describes the model and the training data, and has a checksum of everything in the file.

The header has the fingerprint of the model, the ids of the training requests with the digest of
their dataset, and a digest of each prompt. A run that would edit one of these requests is refused,
even if another dataset contains it with another id.
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

from editkit.datasets.separators import BLANK, separator_of
from editkit.errors import OptionError, message
from editkit.files import written_atomically
from editkit.hypernet.abstract import AbstractNetwork
from editkit.lazy import torch
from editkit.types import EditRequest, TensorState

FILE = "hypernetwork.safetensors"
ASSET = "asset:"
FORMAT = 2
WITHOUT_CHECKSUM = 1  # the format of earlier versions
CHECKSUM = "sha256"  # its key in the header
SHOWN = 5  # number of ids in an error message


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a file holds."""

    key: str  # the editor's option that names the file
    file: str  # its name within a folder
    editor: str  # whose training writes it
    noun: str


HYPERNETWORK = Kind(key="hypernetwork", file=FILE, editor="mend", noun="a hypernetwork")
# of MALMEN and RLEdit
RIDGE = Kind(key="hypernetwork", file=FILE, editor="malmen", noun="a hypernetwork")
PAIR = Kind(key="pair", file="pair.safetensors", editor="serac", noun="a pair of models")


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of such a file."""

    model: str  # its name
    fingerprint: str
    modules: Mapping[str, tuple[int, int]]  # (O, I), in order
    network: Mapping[str, Any]  # NetworkOptions; of a pair, the counterfactual model's and others
    dataset: str  # digest of the training dataset
    trained: tuple[str, ...]  # ids of the requests used for training or validation
    prompts: frozenset[str]  # digests of their prompts
    separators: frozenset[str]  # between their prompts and targets
    facts: Mapping[str, Any]  # description of the training and its results

    @property
    def editor(self) -> str:
        """Whose hypernetwork it is; the facts of MEND's name none."""
        return str(self.facts.get("editor", HYPERNETWORK.editor))

    def leaks(self, requests: Sequence[EditRequest], digest: str) -> list[str]:
        """The ids of those requests that were trained on. `digest` is that of their dataset."""
        ids = set(self.trained) if digest == self.dataset else set()
        return [
            request.id
            for request in requests
            if request.id in ids or prompt_digest(request) in self.prompts
        ]

    def other_separators(self, requests: Sequence[EditRequest]) -> set[str]:
        """What stands between prompt and target in some of those requests and was not trained. A
        chat template takes the place of all separators.
        """
        if self.facts.get("chat_template"):
            return set()
        return {separator_of(request.probe()) for request in requests} - self.separators


def prompt_digest(request: EditRequest) -> str:
    """Twelve hexadecimal digits that identify a request's prompt."""
    return hashlib.sha256(request.full_prompt.encode()).hexdigest()[:12]


def resolve(path: str, kind: Kind = HYPERNETWORK) -> Path:
    """The file of such an option, which is a file, a folder with one, or "asset:..." for a bundled
    one.
    """
    place = Path(path).expanduser()
    if path.startswith(ASSET):
        place = (
            Path(str(importlib.resources.files("editkit"))) / "assets" / path.removeprefix(ASSET)
        )
    return place / kind.file if place.is_dir() else place


def save_hypernetwork(
    path: Path,
    network: AbstractNetwork,
    *,
    model: str,
    fingerprint: str,
    dataset: str,
    trained: Iterable[EditRequest],
    facts: Mapping[str, Any],
) -> None:
    """Writes the file of a hypernetwork atomically."""
    save_trained(
        path,
        network.tensors,
        modules=network.shapes,
        network=dataclasses.asdict(network.options),
        model=model,
        fingerprint=fingerprint,
        dataset=dataset,
        trained=trained,
        facts=facts,
    )


def save_trained(
    path: Path,
    tensors: TensorState,
    *,
    modules: Mapping[str, tuple[int, int]],
    network: Mapping[str, Any],
    model: str,
    fingerprint: str,
    dataset: str,
    trained: Iterable[EditRequest],
    facts: Mapping[str, Any],
) -> None:
    """Writes a file of tensors atomically. The arguments are those of `Header`."""
    from safetensors.torch import save_file

    requests = list(trained)
    header = {
        "format": FORMAT,
        "model": model,
        "fingerprint": fingerprint,
        "modules": {module: list(shape) for module, shape in modules.items()},
        "network": dict(network),
        "dataset": dataset,
        "trained": [request.id for request in requests],
        "prompts": sorted({prompt_digest(request) for request in requests}),
        "separators": sorted({separator_of(request.probe()) for request in requests}),
        "facts": dict(facts),
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header[CHECKSUM] = _checksum(header, tensors)
    with written_atomically(path) as temporary:
        save_file(tensors, temporary, metadata={"editkit": json.dumps(header)})


def _checksum(header: Mapping[str, Any], tensors: TensorState) -> str:
    """The SHA-256 of the header without its checksum and of the tensors, which are on the CPU."""
    described = {key: value for key, value in header.items() if key != CHECKSUM}
    total = hashlib.sha256(json.dumps(described).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def read_header(path: str, kind: Kind = HYPERNETWORK) -> Header:
    """The header of the file. The weights are not read, and the checksum is not compared.

    Raises:
        OptionError: there is no such file, or it is not one of editkit.
    """
    file = resolve(path, kind)
    if not file.is_file():
        fix = f"train one with `editkit train editor={kind.editor} model=... dataset=...`"
        raise OptionError(message(kind.key, f"there is no file {file}", got=path, fix=fix))
    try:
        header = _content(file)
        if header["format"] not in (FORMAT, WITHOUT_CHECKSUM):
            raise ValueError(f"its format is {header['format']!r}")
        return Header(
            model=header["model"],
            fingerprint=header["fingerprint"],
            modules={
                module: (int(rows), int(columns))
                for module, (rows, columns) in header["modules"].items()
            },
            network=header["network"],
            dataset=header["dataset"],
            trained=tuple(header["trained"]),
            prompts=frozenset(header["prompts"]),
            # Earlier versions did not record it, and put a blank.
            separators=frozenset(header.get("separators") or [BLANK]),
            facts=header["facts"],
        )
    except (ValueError, KeyError, TypeError, MemoryError) as error:
        problem = f"{file} is not {kind.noun} of editkit ({type(error).__name__}: {error})"
        raise OptionError(message(kind.key, problem)) from None


def _content(file: Path) -> dict[str, Any]:
    """The header as it is in the file. Raises KeyError, TypeError or ValueError for another one."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        described = json.loads(opened.read(min(length, file.stat().st_size)))
    content: dict[str, Any] = json.loads(described["__metadata__"]["editkit"])
    return content


def read_tensors(path: str, kind: Kind = HYPERNETWORK) -> dict[str, torch.Tensor]:
    """The tensors of a file whose header was read, on the CPU.

    Raises:
        OptionError: the file is unreadable, or does not match its checksum.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = resolve(path, kind)
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise OptionError(message(kind.key, f"cannot read {file} ({error})")) from None
    content = _content(file)
    if content["format"] == FORMAT and content.get(CHECKSUM) != _checksum(content, tensors):
        problem = f"{file} is damaged: it does not match its checksum"
        fix = "restore the file, or repeat its training"
        raise OptionError(message(kind.key, problem, fix=fix))
    return tensors
