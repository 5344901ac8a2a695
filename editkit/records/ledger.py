"""The ledger of a run or a session: each edit with its requests, factors, author's note, time and
digest.

    ledger.jsonl                 one line for each block: a batch of edits, which one step made
    ledger/head.json             the model, the editor and its restraints
    ledger/<id>.safetensors      the updates of a block: `<matrix>|left` and `|right`, or `|dense`

A line is appended after its file is whole. Its `digest` covers the line and the digest before it,
and the first one covers the head: a chain. `content` covers the requests and the factors alone, so
that the same edit has the same one in every run.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError, message
from editkit.files import file_digest, not_an_object, write_atomically, written_atomically
from editkit.linalg.lowrank import LowRank, frobenius
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.linalg.lowrank import Update

LEDGER, FACTORS, HEAD = "ledger.jsonl", "ledger", "head.json"
VERSION = 1
A_LEDGER = "the folder of a run with ledger.keep=true, or of a session's ledger"


@dataclass(frozen=True, kw_only=True, eq=False)
class LedgerRecord:
    """A block as it was made."""

    step: int  # its id
    requests: tuple[EditRequest, ...]
    updates: Mapping[str, Update]  # by matrix, in the order in which they were written
    restrained: tuple[str, ...] = ()  # restraints on the total that acted on the model after it
    ends: tuple[str, ...] = ()  # and at the end of the run
    author: str | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """A line of a ledger."""

    id: int
    requests: tuple[EditRequest, ...]
    updates: Mapping[str, Mapping[str, Any]]  # by matrix: shape, rank (None: dense), norm
    restrained: tuple[str, ...]
    ends: tuple[str, ...]
    time: str  # UTC, ISO 8601
    author: str | None
    note: str | None
    factors: str  # SHA-256 of the file of its updates
    content: str  # SHA-256 of requests and factors
    digest: str  # of the chain
    folder: Path

    @property
    def path(self) -> Path:
        """The file of its updates."""
        return factors_path(self.folder, self.id)

    def load(self) -> dict[str, Update]:
        """Its updates by matrix, with the bits that were applied. Raises ConfigError if their file
        is missing or does not match its checksum.
        """
        from safetensors import safe_open

        if not self.path.exists() or file_digest(self.path) != self.factors:
            problem = "does not match its checksum" if self.path.exists() else "is missing"
            fix = "restore the file from a copy"
            raise ConfigError(message(str(self.path), f"the file of a block {problem}", fix=fix))
        loaded: dict[str, Update] = {}
        with safe_open(self.path, framework="pt") as file:
            # A copy: the address of a mapped tensor decides how a kernel sums.
            def tensor(name: str) -> Any:
                return file.get_tensor(name).clone()

            for module, about in self.updates.items():
                loaded[module] = (
                    tensor(f"{module}|dense")
                    if about["rank"] is None
                    else LowRank(tensor(f"{module}|left"), tensor(f"{module}|right"))
                )
        return loaded


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """A ledger whose chain of digests is whole."""

    folder: Path
    head: Mapping[str, Any]
    blocks: tuple[Block, ...]  # those that are in the model, in their order
    undone: tuple[int, ...] = ()  # ids of blocks that a session took back

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """All edits that are in the model, in their order."""
        return tuple(request for block in self.blocks for request in block.requests)


def factors_path(folder: Path, number: int) -> Path:
    """The file of a block's updates."""
    return folder / FACTORS / f"{number:08d}.safetensors"


@dataclass(kw_only=True)
class LedgerWriter:
    """Writes the files of blocks and makes their lines. The caller appends the lines.

    Args:
        folder: of the run or session.
        head: the content of head.json, which is written if the ledger is empty.
    """

    folder: Path
    head: Mapping[str, Any]
    _digest: str = field(init=False, default="")

    def __post_init__(self) -> None:
        lines = _lines(self.folder / LEDGER)
        if not lines:
            payload = json.dumps({"version": VERSION} | dict(self.head), indent=1).encode()
            write_atomically(self.folder / FACTORS / HEAD, payload)
        self._digest = json.loads(lines[-1])["digest"] if lines else file_digest(self._head_path)

    @property
    def _head_path(self) -> Path:
        return self.folder / FACTORS / HEAD

    def line(self, record: LedgerRecord) -> bytes:
        """Writes the file of a block. Returns its line."""
        from safetensors.torch import save_file

        tensors: dict[str, Any] = {}
        about: dict[str, dict[str, Any]] = {}
        for module, update in record.updates.items():
            parts = (
                {"left": update.left_OR, "right": update.right_IR}
                if isinstance(update, LowRank)
                else {"dense": update}
            )
            for name, tensor in parts.items():
                # A copy: safetensors refuses tensors that share memory.
                tensors[f"{module}|{name}"] = tensor.detach().cpu().contiguous().clone()
            about[module] = {
                "shape": list(update.shape),
                "rank": update.rank if isinstance(update, LowRank) else None,
                "norm": frobenius(update),
            }
        path = factors_path(self.folder, record.step)
        with written_atomically(path) as temporary:
            save_file(tensors, temporary)  # without metadata: the same tensors, the same bytes
        requests, factors = [request_fields(each) for each in record.requests], file_digest(path)
        fields = {
            "id": record.step,
            "requests": requests,
            "updates": about,
            "restrained": list(record.restrained),
            "ends": list(record.ends),
            "author": record.author,
            "note": record.note,
            "factors": factors,
            "content": _content(requests, factors),
        }
        return self._chained(fields)

    def undone(self, number: int) -> bytes:
        """The line that says that a block was taken back."""
        return self._chained({"undone": number})

    def _chained(self, fields: dict[str, Any]) -> bytes:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        fields = {name: value for name, value in fields.items() if value not in (None, [])}
        fields |= {"time": now}
        self._digest = chained(self._digest, fields)
        return json.dumps(fields | {"digest": self._digest}).encode() + b"\n"


def chained(before: str, fields: Mapping[str, Any]) -> str:
    """The SHA-256 of the digest before a line and of its fields without their digest."""
    kept = {name: value for name, value in fields.items() if name != "digest"}
    text = f"{before}\n{json.dumps(kept, sort_keys=True)}"
    return hashlib.sha256(text.encode()).hexdigest()


def _content(requests: Sequence[Mapping[str, Any]], factors: str) -> str:
    return hashlib.sha256(f"{json.dumps(requests, sort_keys=True)}\n{factors}".encode()).hexdigest()


def request_fields(request: EditRequest) -> dict[str, Any]:
    """An edit request as plain JSON values, without fields that are empty."""
    fields = json.loads(json.dumps(dataclasses.asdict(request)))
    always = ("id", "prompt", "subject", "target")
    return {
        name: value
        for name, value in fields.items()
        if name in always or value not in (None, [], {})
    }


@functools.cache
def _requests() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(tuple[EditRequest, ...])


def read_ledger(folder: Path) -> Ledger:
    """The ledger in a folder. A part of a line that is still being written is left out. The files
    of the blocks are not read (`Block.load`).

    Raises:
        ConfigError: there is no ledger, or its head or a line is malformed or not the one that was
            written. The first line that breaks the chain is named.
    """
    path, head_path = folder / LEDGER, folder / FACTORS / HEAD
    if not folder.is_dir():
        raise ConfigError(message(str(folder), "not a folder", expected=A_LEDGER))
    if not path.exists():
        fix = "run it with ledger.keep=true resume=never; an edit that was not kept is lost"
        problem = "has no ledger"
        raise ConfigError(message(str(folder), problem, expected=A_LEDGER, fix=fix))
    if unreadable := not_an_object(head_path):
        raise ConfigError(message(str(head_path), unreadable))
    head = json.loads(head_path.read_text(encoding="utf-8"))
    if head.get("version") != VERSION:
        got, expected = head.get("version"), f"version {VERSION}"
        raise ConfigError(message(str(head_path), "unknown version", got=got, expected=expected))
    blocks: dict[int, Block] = {}
    undone: list[int] = []
    for line in _checked(path, file_digest(head_path)):
        if "undone" in line:
            blocks.pop(line["undone"], None)
            undone.append(line["undone"])
        else:
            try:
                block = _block(folder, line)
            except (KeyError, TypeError, ValueError) as error:
                problem = f"a block that cannot be read ({error!r})"
                raise ConfigError(message(str(path), problem, got=line.get("id"))) from None
            blocks[block.id] = block
    return Ledger(folder=folder, head=head, blocks=tuple(blocks.values()), undone=tuple(undone))


def _lines(path: Path) -> list[bytes]:
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return whole.split(b"\n") if whole else []


def _checked(path: Path, before: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise TypeError(f"{type(fields).__name__} instead of a JSON object")
            digest = chained(before, fields)
            if fields["digest"] != digest:
                problem = "the line, the one before it or the head is not what was written"
                fix = "restore the ledger from a copy"
                raise ConfigError(message(where, problem, got=str(fields["digest"])[:12], fix=fix))
            yield fields
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(message(where, f"malformed line ({error})")) from None
        before = digest


def _block(folder: Path, line: Mapping[str, Any]) -> Block:
    return Block(
        id=line["id"],
        requests=_requests().validate_python(line["requests"]),
        updates=line["updates"],
        restrained=tuple(line.get("restrained", ())),
        ends=tuple(line.get("ends", ())),
        time=line["time"],
        author=line.get("author"),
        note=line.get("note"),
        factors=line["factors"],
        content=line["content"],
        digest=line["digest"],
        folder=folder,
    )
