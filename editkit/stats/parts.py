"""Sums that survive an interruption and that several processes can share: a file for each part
until all parts are complete.

The files are in a separate folder below the store's, whose name is a digest of everything that the
sums depend on. A file is replaced as a whole after a block, so a killed process loses its work
since the last save. The result depends neither on the assignment of parts to processes nor on the
number of processes (see `stats.collect`). One process can finish the work that four have started.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from editkit.errors import ConfigError, message
from editkit.files import take_lock, written_atomically
from editkit.lazy import torch
from editkit.stats.collect import (
    PARTS,
    Collector,
    MomentSum,
    PartSum,
    TriangleSum,
    blocks_of,
    require_tokens,
)
from editkit.stats.shards import Shard

SAVING_SHARE = 0.05  # the largest share of the time that saving may take
ATTEMPTS = 100  # at creating a file in a folder that other processes remove


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The unfinished sums of some modules over some documents, in a separate folder."""

    folder: Path
    num_documents: int

    @property
    def nonempty(self) -> list[int]:
        """The parts that have documents."""
        return [part for part in range(PARTS) if blocks_of(part, self.num_documents)]

    def missing(self) -> list[int]:
        """The parts whose files do not contain all their blocks."""
        return [
            part
            for part in self.nonempty
            if self.blocks_done(part) < len(blocks_of(part, self.num_documents))
        ]

    def blocks_done(self, part: int) -> int:
        """The number of blocks in the file of a part."""
        from safetensors import SafetensorError, safe_open

        path = self.path(part)
        if not path.exists():
            return 0
        try:
            with safe_open(path, framework="pt") as opened:
                return int((opened.metadata() or {})["num_blocks"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            if not path.exists():  # another process has merged the parts and removed them
                return 0
            raise _corrupt(path, error) from None

    def path(self, part: int) -> Path:
        return self.folder / f"part-{part}.safetensors"

    def save(self, part: int, part_sum: PartSum) -> None:
        """Replaces the file of a part."""
        from safetensors.torch import save_file

        tensors = {
            _name(module, row): block.cpu()
            for module, sums in part_sum.sums.items()
            for row, block in enumerate(sums.blocks)
        }
        facts = {"num_blocks": str(part_sum.num_blocks), "num_tokens": str(part_sum.num_tokens)}
        checksums = {
            module: _checksum(
                facts, [tensors[_name(module, row)] for row in range(len(sums.blocks))]
            )
            for module, sums in part_sum.sums.items()
        }
        with written_atomically(self.path(part)) as temporary:
            save_file(tensors, temporary, metadata=facts | checksums)

    def load(
        self, part: int, modules: Sequence[str], *, device: torch.device | str = "cpu"
    ) -> PartSum:
        """The saved sums of some modules of a part. Raises ConfigError for a damaged file."""
        from safetensors import SafetensorError, safe_open

        path = self.path(part)
        sums = {}
        try:
            with safe_open(path, framework="pt") as opened:
                facts, names = opened.metadata() or {}, set(opened.keys())
                counts = {name: facts[name] for name in ("num_blocks", "num_tokens")}
                for module in modules:
                    rows = [
                        opened.get_tensor(_name(module, row))
                        for row in range(sum(name.startswith(f"{module}/") for name in names))
                    ]
                    if facts[module] != _checksum(counts, rows):
                        raise ValueError("it does not match its checksum")
                    sums[module] = TriangleSum([row.to(device) for row in rows])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise _corrupt(path, error) from None
        return PartSum(
            sums, num_blocks=int(counts["num_blocks"]), num_tokens=int(counts["num_tokens"])
        )

    def merged(self, modules: Sequence[str]) -> Iterator[tuple[str, MomentSum]]:
        """The sum of every module over all parts in order, with one module in memory at a time."""
        for module in modules:
            total, num_tokens = None, 0
            for part in self.nonempty:
                part_sum = self.load(part, [module])
                num_tokens += part_sum.num_tokens
                if total is None:
                    total = part_sum.sums[module]
                else:
                    total.add(part_sum.sums[module])
            require_tokens(num_tokens)
            assert total is not None
            yield module, MomentSum(total.dense(), num_tokens)


def compute(
    parts: Parts,
    collector: Collector,
    texts: Sequence[str],
    *,
    shard: Shard,
    save_every_s: float,
    is_stored: Callable[[], bool],
    announce: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> None:
    """Completes the parts of this process, and waits for those that another process works on.

    Args:
        is_stored: whether another process has stored the result and removed the parts.
        progress: gets the number of processed documents and the total number of this process's
            share. It may raise an exception to stop the work, which is saved first.
    """
    mine = [part for part in parts.nonempty if part % shard.of == shard.rank]
    sizes = {part: [len(block) for block in blocks_of(part, len(texts))] for part in mine}
    done = {part: sum(sizes[part][: parts.blocks_done(part)]) for part in mine}
    total = sum(map(sum, sizes.values()))
    if any(done.values()):
        announce(
            f"resuming the work of an earlier process: {sum(done.values())} of {total} "
            "documents are done"
        )
    progress(sum(done.values()), total)
    for may_wait in (False, True):  # first the parts that no other process works on
        for part in mine:
            if is_stored() or part not in parts.missing():
                continue
            if may_wait:
                announce(f"waiting for another process that works on part {part + 1} of {PARTS}")
            with locked(parts.folder / f"part-{part}.lock", may_wait=may_wait) as is_mine:
                if is_mine and not is_stored():
                    with contextlib.closing(
                        _finish(parts, part, collector, texts, save_every_s=save_every_s)
                    ) as steps:
                        for num_documents in steps:
                            done[part] = num_documents
                            progress(sum(done.values()), total)


def _finish(
    parts: Parts, part: int, collector: Collector, texts: Sequence[str], *, save_every_s: float
) -> Generator[int]:
    """Processes the remaining blocks of a part. Yields the number of processed documents after each
    block. If it is closed early, it saves the part first.
    """
    blocks = blocks_of(part, len(texts))
    done = parts.blocks_done(part)
    if done == len(blocks):  # another process has completed the part in the meantime
        return
    part_sum = (
        parts.load(part, collector.modules, device=collector.model.device)
        if done
        else collector.empty()
    )
    saved, cost = time.monotonic(), 0.0
    for block in blocks[part_sum.num_blocks :]:
        collector.add_block(part_sum, [texts[index] for index in block])
        waited = time.monotonic() - saved
        is_due = not save_every_s or waited >= max(save_every_s, cost / SAVING_SHARE)
        if is_due or part_sum.num_blocks == len(blocks):
            parts.save(part, part_sum)
            cost, saved = time.monotonic() - saved - waited, time.monotonic()
        try:
            yield sum(map(len, blocks[: part_sum.num_blocks]))
        except GeneratorExit:
            parts.save(part, part_sum)
            raise


@contextlib.contextmanager
def locked(path: Path, *, may_wait: bool) -> Iterator[bool]:
    """Gives whether this process holds the lock of a file, which is created if it is missing.

    On a file system without locks every process counts as the holder. Two processes that do the
    same work write the same bits: the lock saves time, nothing else.
    """
    with _created(path) as file:
        try:
            is_mine = take_lock(file, patience_s=None if may_wait else 0.0)
        except OSError:
            is_mine = True
        yield is_mine


def _created(path: Path) -> IO[str]:
    """Creates a file and its folders, again if another process removes a folder in between."""
    for _ in range(ATTEMPTS):
        with contextlib.suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return open(path, "w")
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))


def _name(module: str, row: int) -> str:
    return f"{module}/{row:03d}"


def _corrupt(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        message(
            str(path),
            f"corrupt statistics, the unfinished sums cannot be used: {error}",
            fix="delete the file, so that its part is computed again",
        )
    )


def _checksum(facts: dict[str, str], tensors: Sequence[torch.Tensor]) -> str:
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for tensor in tensors:
        total.update(f"{tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()
