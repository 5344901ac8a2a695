"""The files of an exported folder that hold what stands beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.config.identity import TARGET
from editkit.config.schema import Problems, resolve
from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.beside import SIDE_CONFIG, SIDE_TENSORS, AbstractSide, Attached
from editkit.model.fingerprint import fingerprint
from editkit.model.matrices import find_module, is_matrix_module, matrix_of
from editkit.model.side_value import AbstractBeside

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

FORMAT = 1


def write_sides(model: EditableModel, folder: Path) -> None:
    """Writes the model's sides; nothing without any."""
    if not model.sides:
        return
    from safetensors.torch import save_file

    sides = [
        {TARGET: f"{type(side).__module__}.{type(side).__qualname__}", "options": side.options()}
        for side in model.sides
    ]
    facts = {"format": FORMAT, "base": model.family.base, "fingerprint": model.fingerprint}
    (folder / SIDE_CONFIG).write_text(json.dumps(facts | {"sides": sides}, indent=1))
    tensors = {
        f"{number}|{name}": tensor.cpu().contiguous().clone()
        for number, side in enumerate(model.sides)
        for name, tensor in side.state().items()
    }
    save_file(tensors, folder / SIDE_TENSORS)


def attach_sides(network: Any, tokenizer: Any, folder: Path) -> tuple[AbstractBeside, ...]:
    """Puts the sides of a folder beside the weights of its network, and returns them.

    Raises:
        ConfigError: a file is missing or damaged, or the sides belong to another model.
    """
    if not (folder / SIDE_CONFIG).exists() and not (folder / SIDE_TENSORS).exists():
        return ()
    facts, tensors = _read(folder)
    if (now := fingerprint(network, tokenizer)) != facts["fingerprint"]:
        problem = "it stands beside another model than the one of this folder"
        raise ConfigError(
            message(
                str(folder / SIDE_TENSORS),
                problem,
                got=f"weights or tokenizer with fingerprint {now[:12]}...",
                expected=f"{facts['fingerprint'][:12]}...",
                fix="export the run again",
            )
        )
    sides = tuple(_restored(facts["sides"], tensors, folder))
    problems = []
    for side in sides:
        if not isinstance(side, AbstractSide):
            continue
        module = find_module(network, side.module, of=str(folder))
        if is_matrix_module(module):  # else the fingerprint alone says that it fits
            rows, columns = matrix_of(side.module, module).shape
            problems += side.problems((rows, columns))
    if problems:
        raise ConfigError(problems)
    moved = [side.to(network.device) for side in sides]
    Attached(network, facts["base"], moved, tokenizer)
    return sides


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        facts = json.loads((folder / SIDE_CONFIG).read_bytes())
        if not {"format", "base", "fingerprint", "sides"} <= facts.keys():
            raise ValueError("keys are missing")
        return facts, load_file(folder / SIDE_TENSORS)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        problem = f"what stands beside the weights cannot be read ({error})"
        raise ConfigError(message(str(folder), problem, fix="export the run again")) from None


def _restored(
    nodes: Sequence[Mapping[str, Any]], tensors: Mapping[str, torch.Tensor], folder: Path
) -> list[AbstractBeside]:
    problems, sides = Problems(), []
    for number, node in enumerate(nodes):
        kind = resolve(node.get(TARGET), str(folder / SIDE_CONFIG), AbstractBeside, problems)
        state = {
            name.removeprefix(f"{number}|"): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{number}|")
        }
        if kind is not None:
            try:
                sides.append(kind.restored(node["options"], state))
            except KeyError as error:
                problems.add(message(str(folder), f"what stands beside the weights lacks {error}"))
    if problems.messages:
        raise ConfigError(problems.messages)
    return sides
