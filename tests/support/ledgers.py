"""Small ledgers of a random model, without a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from editkit.linalg.lowrank import LowRank, Update
from editkit.model.editable import EditableModel
from editkit.model.load import ModelConfig
from editkit.records.ledger import LEDGER, LedgerRecord, LedgerWriter
from editkit.types import EditRequest
from tests.support.helpers import Kind, request, tiny_model


def saved_base(folder: Path, kind: Kind = "llama", *, seed: int | None = None) -> Path:
    """A random model in a folder; with a seed, another one."""
    model = tiny_model(kind)
    if seed is not None:
        with torch.no_grad():
            matrix = model.weight(model.family.down_projection(0))
            matrix += torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed))
    model.network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


def matrices(model: EditableModel) -> tuple[str, str]:
    """Of two layers."""
    return model.family.down_projection(0), model.family.down_projection(2)


def update_of(model: EditableModel, module: str, seed: int, *, rank: int | None = 1) -> Update:
    """A random update; dense if the rank is None."""
    rows, columns = model.weight(module).shape
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(rows, columns, generator=generator)
    return LowRank(
        torch.randn(rows, rank, generator=generator),
        torch.randn(columns, rank, generator=generator),
    )


def write_ledger(
    folder: Path,
    base: Path,
    blocks: Sequence[tuple[Mapping[str, Update], Sequence[EditRequest]]],
    *,
    restraint: Mapping[str, Any] | None = None,
    restrained: tuple[str, ...] = (),
    note: str | None = None,
) -> Path:
    """A ledger of these blocks, numbered from 1."""
    model = ModelConfig(id=str(base)).load("cpu")
    head = {
        "kind": "run",
        "model": {"id": str(base)},
        "fingerprint": model.fingerprint,
        "modules": {name: list(model.weight(name).shape) for name in matrices(model)},
        "editor": {"name": "memit"},
        "restraint": dict(restraint or {}),
        "dataset": {"name": "test", "digest": "0"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LEDGER).touch()
    writer = LedgerWriter(folder=folder, head=head)
    for number, (updates, requests) in enumerate(blocks, start=1):
        record = LedgerRecord(
            step=number,
            requests=tuple(requests),
            updates=updates,
            restrained=restrained,
            note=note,
        )
        with open(folder / LEDGER, "ab") as file:
            file.write(writer.line(record))
    return folder


def four_blocks(folder: Path, kind: Kind = "llama") -> tuple[Path, list[Mapping[str, Update]]]:
    """A run's ledger of a request at both matrices, two at once, one at the second matrix alone
    and a dense one; and its updates.
    """
    base = saved_base(folder / "base", kind)
    model = ModelConfig(id=str(base)).load("cpu")
    first, second = matrices(model)
    updates: list[Mapping[str, Update]] = [
        {first: update_of(model, first, 1), second: update_of(model, second, 2)},
        {first: update_of(model, first, 3, rank=2), second: update_of(model, second, 4, rank=2)},
        {second: update_of(model, second, 5)},
        {first: update_of(model, first, 6, rank=None)},
    ]
    requests = [[request(0)], [request(1), request(2)], [request(3)], [request(4)]]
    run = write_ledger(folder / "run", base, list(zip(updates, requests, strict=True)))
    return run, updates
