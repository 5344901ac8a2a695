"""The ledger of a `Session`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.editors.base import AbstractAnyEditor, AbstractEditor
from editkit.errors import ConfigError, message
from editkit.records.ledger import LEDGER, LedgerRecord, LedgerWriter
from editkit.restraints.base import Restraints
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update
    from editkit.model.editable import EditableModel


@dataclass(kw_only=True)
class SessionLedger:
    """Writes the edits of a session into a folder that `editkit ledger` reads."""

    writer: LedgerWriter
    author: str | None
    number: int = 0  # of the last block

    def keep(
        self,
        requests: Sequence[EditRequest],
        updates: Mapping[str, Update],
        *,
        restrained: tuple[str, ...],
        note: str | None,
    ) -> int:
        """Appends a block and returns its id."""
        self.number += 1
        record = LedgerRecord(
            step=self.number,
            requests=tuple(requests),
            updates=updates,
            restrained=restrained,
            author=self.author,
            note=note,
        )
        self._append(self.writer.line(record))
        return self.number

    def undone(self, number: int) -> None:
        """Appends that a block was taken back."""
        self._append(self.writer.undone(number))

    def _append(self, line: bytes) -> None:
        with open(self.writer.folder / LEDGER, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def begin_ledger(
    folder: str | Path,
    model: EditableModel,
    editor: AbstractAnyEditor[Any],
    restraints: Restraints,
    modules: Sequence[str],
    *,
    author: str | None,
) -> SessionLedger:
    """An empty ledger in a folder.

    Raises:
        ConfigError: the folder is not empty, the editor edits no weights, or the model has edits.
    """
    path, problems = Path(folder).expanduser(), []
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        problem, fix = f"{path} exists and is not empty", "name a new folder, or an empty one"
        problems.append(message("ledger", problem, fix=fix))
    if not isinstance(editor, AbstractEditor):
        problem = f"what {type(editor).__name__} puts beside the weights is no sum of updates"
        problems.append(message("ledger", problem, expected="an editor of weights"))
    if any(not total.is_zero for total in model.totals().values()):
        problem, fix = "the model has edits that this ledger would lack", "use model.reset()"
        problems.append(message("ledger", problem, fix=fix))
    if problems:
        raise ConfigError(problems)
    named: dict[str, Any] = dict(restraints.totals)
    if restraints.solve is not None:
        named[restraints.solve_name] = restraints.solve
    dtype = str(model.dtype).removeprefix("torch.")
    head = {
        "kind": "session",
        "model": {"id": model.network.config.name_or_path or model.name, "dtype": dtype},
        "fingerprint": model.fingerprint,
        "modules": {module: list(model.weight(module).shape) for module in modules},
        "editor": {"name": type(editor).__name__.lower()},
        "restraint": {name: _node(each) for name, each in named.items()},
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / LEDGER).touch()
    return SessionLedger(writer=LedgerWriter(folder=path, head=head), author=author)


def _node(restraint: Any) -> dict[str, Any]:
    """A restraint as its options."""
    kind = type(restraint)
    options: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(restraint)))
    return {"_target_": f"{kind.__module__}.{kind.__qualname__}"} | options
