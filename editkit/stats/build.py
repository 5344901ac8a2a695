"""The second moments of a model's keys: stored ones are read, missing ones are collected and
stored.

Several processes may work on the same statistics. Each takes its share of the parts, and the last
one merges them.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from editkit.errors import ConfigError, message
from editkit.stats.collect import BLOCK, PARTS, Collector
from editkit.stats.corpus import StatsConfig, digest, fewest, texts
from editkit.stats.estimate import estimate
from editkit.stats.imported import imported_keys
from editkit.stats.parts import Parts, compute, locked
from editkit.stats.remote import Remote
from editkit.stats.shards import ALONE, Shard
from editkit.stats.store import MomentKey, Moments, mapped_into, read, write

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

Place = Literal["device", "cpu", "disk"]  # the storage of second moments after reading

UNFINISHED = "unfinished"  # folder of incomplete sums


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """The documents and files of the statistics that a configuration requires."""

    model: EditableModel
    config: StatsConfig
    documents: tuple[str, ...]
    keys: Mapping[str, MomentKey]  # by module

    @property
    def folder(self) -> Path:
        return Path(self.config.folder).expanduser()

    def path(self, module: str) -> Path:
        return self.folder / self.keys[module].file_name

    def missing(self) -> list[str]:
        """The modules whose second moment is not stored."""
        return [module for module in self.keys if not self.path(module).exists()]

    def read(self, place: Place = "device") -> Moments:
        """All second moments, on the model's device, on the CPU, or mapped from files. Raises
        ConfigError for a damaged file.
        """
        device = self.model.device if place == "device" else "cpu"
        keep = mapped_into(self.folder) if place == "disk" else None
        return Moments(
            {
                module: read(self.path(module), key, device=device, keep=keep)
                for module, key in self.keys.items()
            },
            documents=self.documents,
        )

    @property
    def num_documents(self) -> int:
        return len(self.documents)


def build(
    model: EditableModel,
    modules: Sequence[str],
    config: StatsConfig,
    *,
    place: Place = "device",
    announce: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Moments:
    """The second moments of `modules`.

    Stored ones are read and checked. Missing ones are collected in one pass and stored.

    Args:
        announce: gets a sentence about the planned computation and its memory.
        progress: gets the number of processed documents and the total number.

    Raises:
        ConfigError: a file is corrupt, or the source of texts cannot be read.
    """
    if not modules:
        return Moments()
    required = statistics(model, modules, config)
    fill_store(required, announce=announce, progress=progress)
    return required.read(place)


def statistics(model: EditableModel, modules: Sequence[str], config: StatsConfig) -> Statistics:
    """Reads the texts and determines the files. Raises ConfigError for `stats=none`, and for
    `stats=imported` if a module has no import.
    """
    if config.source == "imported":
        return Statistics(
            model=model,
            config=config,
            documents=(),
            keys=imported_keys(model, modules, config),
        )
    if config.source == "none":
        raise ConfigError(
            message(
                "stats",
                f"the editor needs the second moments of {', '.join(modules)}",
                got="none",
                expected="world, facts, text, hub or imported",
            )
        )
    context_length = min(config.context_length, model.max_length)
    documents = tuple(texts(config))
    if config.preset == "minimal":

        def count_tokens(batch: Sequence[str]) -> list[int]:
            encoded = model.tokenizer(list(batch), truncation=True, max_length=context_length)
            return [len(ids) for ids in encoded["input_ids"]]

        size = max(model.weight(module).shape[1] for module in modules)
        num_tokens = config.vectors_per_dimension * size
        documents = tuple(
            fewest(documents, num_tokens=num_tokens, count_tokens=count_tokens, seed=config.seed)
        )
    return Statistics(
        model=model,
        config=config,
        documents=documents,
        keys=moment_keys(model, modules, config, documents),
    )


def moment_keys(
    model: EditableModel, modules: Sequence[str], config: StatsConfig, documents: Sequence[str]
) -> dict[str, MomentKey]:
    """The key of each module's file."""
    corpus = digest(documents)
    dtype = str(model.dtype).removeprefix("torch.")
    return {
        module: MomentKey(
            model=model.name,
            fingerprint=model.fingerprint,
            module=module,
            corpus=corpus,
            num_documents=len(documents),
            context_length=min(config.context_length, model.max_length),
            dtype=dtype,
            products="float64"
            if dtype == "float64" and config.products == "float32"
            else config.products,
        )
        for module in modules
    }


def fill_store(
    required: Statistics,
    *,
    shard: Shard = ALONE,
    announce: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Computes the missing second moments, or this process's share of them. Interrupted work
    resumes.

    Returns whether all second moments are stored afterwards.

    Raises:
        ConfigError: the texts have no tokens, unfinished sums are damaged, or the remote does not
            answer or holds a damaged file.
    """
    announce, progress = announce or _ignore, progress or _ignore
    _pull(required, announce)
    if not (missing := required.missing()):
        return True
    model, config = required.model, required.config
    # The published code computes missing statistics on the model in its current, edited state.
    assert not any(model.total(module).rank for module in model.edited_modules), (
        "second moments belong to the unedited model"
    )
    announce(str(estimate(model, missing, config, num_documents=required.num_documents)))
    parts = Parts(
        folder=required.folder
        / UNFINISHED
        / _digest([required.keys[module] for module in missing]),
        num_documents=required.num_documents,
    )
    collector = Collector(
        model,
        missing,
        context_length=required.keys[missing[0]].context_length,
        batch_tokens=config.batch_tokens,
        products=config.products,
    )

    def is_stored() -> bool:
        return not required.missing()

    compute(
        parts,
        collector,
        required.documents,
        shard=shard,
        save_every_s=config.save_every_s,
        is_stored=is_stored,
        announce=announce,
        progress=progress,
    )
    if not is_stored() and parts.missing():
        return False
    del collector  # frees its buffers of keys
    with locked(parts.folder / "merge.lock", may_wait=True):
        if not is_stored():
            for module, moment_sum in parts.merged(missing):
                write(required.folder, required.keys[module], moment_sum)
        shutil.rmtree(parts.folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process's sums lie there, or it was quicker
        parts.folder.parent.rmdir()
    return True


def _pull(required: Statistics, announce: Callable[[str], None]) -> None:
    """Fetches the missing second moments that the remote has."""
    address = required.config.remote
    if address is None or not (missing := required.missing()):
        return
    remote = Remote(address=address, timeout_s=required.config.remote_timeout_s)
    entries = remote.entries()
    found = [module for module in missing if required.keys[module].file_name in entries]
    announce(f"{len(found)} of {len(missing)} second moments are at {address}")
    for module in found:
        key = required.keys[module]
        remote.fetch(entries[key.file_name], required.folder, partial(read, key=key))


def _digest(keys: Sequence[MomentKey]) -> str:
    """The name of a folder of unfinished sums: a digest of everything that determines its files."""
    cut = f"{PARTS} parts, blocks of {BLOCK}"
    return hashlib.sha256("\n".join([cut, *(key.as_json() for key in keys)]).encode()).hexdigest()[
        :20
    ]


def _ignore(*_: object) -> None:
    """Ignores all announcements and progress."""
