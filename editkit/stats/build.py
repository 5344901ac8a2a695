"""From a model and a source of texts to its second moments: what is stored is read, what is missing
is collected and stored.

Several processes may be started for the same statistics: each takes its share of the parts, and
whoever ends last puts them together.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from editkit.errors import ConfigError
from editkit.stats.collect import BLOCK, PARTS, Collector
from editkit.stats.corpus import StatsConfig, digest, fewest, texts
from editkit.stats.estimate import estimate
from editkit.stats.parts import Parts, compute, locked
from editkit.stats.shards import ALONE, Shard
from editkit.stats.store import MomentKey, Moments, mapped_into, read, write

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

Place = Literal["device", "cpu", "disk"]  # where second moments lie once they are read

UNFINISHED = "unfinished"  # folder of the sums that are not complete


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """What a configuration asks for: which documents, which files."""

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
        """All of them: on the model's device, on the CPU, or mapped from files. Raises ConfigError
        for a damaged file.
        """
        device = self.model.device if place == "device" else "cpu"
        keep = mapped_into(self.folder) if place == "disk" else None
        return Moments(
            {
                module: read(self.path(module), key, device=device, keep=keep)
                for module, key in self.keys.items()
            }
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
    """The second moments of `modules`: those stored are read and checked, the missing ones are
    collected in one pass and stored.

    `announce` is told in a sentence what will be computed and what memory it takes, `progress` the
    number of documents done, and of how many. Raises ConfigError for a corrupt file, or a source
    that cannot be read.
    """
    if not modules:
        return Moments()
    wanted = statistics(model, modules, config)
    fill_store(wanted, announce=announce, progress=progress)
    return wanted.read(place)


def statistics(model: EditableModel, modules: Sequence[str], config: StatsConfig) -> Statistics:
    """Reads the texts, and names what is to be stored. Raises ConfigError where there is no
    source.
    """
    if config.source == "none":
        raise ConfigError(
            f"stats=none, but the editor needs the second moments of {', '.join(modules)} - "
            "choose stats=world|text|hub."
        )
    context_length = min(config.context_length, model.max_length)
    documents = tuple(texts(config))
    if config.preset == "minimal":

        def count_tokens(some: Sequence[str]) -> list[int]:
            return [
                len(ids)
                for ids in model.tokenizer(list(some), truncation=True, max_length=context_length)[
                    "input_ids"
                ]
            ]

        size = max(model.weight(module).shape[1] for module in modules)
        wanted = config.vectors_per_dimension * size
        documents = tuple(
            fewest(documents, num_tokens=wanted, count_tokens=count_tokens, seed=config.seed)
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
    wanted: Statistics,
    *,
    shard: Shard = ALONE,
    announce: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> bool:
    """Computes what is missing, or this process's share of it; whether everything is stored
    afterwards.

    Work that was cut off is gone on with. Raises ConfigError where the texts hold no token, and for
    damaged unfinished sums.
    """
    announce, progress = announce or _ignore, progress or _ignore
    if not (missing := wanted.missing()):
        return True
    model, config = wanted.model, wanted.config
    # Differs from published code, which computes missing statistics on whatever the model has
    # become.
    assert not any(model.total(module).rank for module in model.edited_modules), (
        "second moments are taken on the unedited model"
    )
    announce(str(estimate(model, missing, config, num_documents=wanted.num_documents)))
    parts = Parts(
        folder=wanted.folder / UNFINISHED / _digest([wanted.keys[module] for module in missing]),
        num_documents=wanted.num_documents,
    )
    collector = Collector(
        model,
        missing,
        context_length=wanted.keys[missing[0]].context_length,
        batch_tokens=config.batch_tokens,
        products=config.products,
    )

    def is_stored() -> bool:
        return not wanted.missing()

    compute(
        parts,
        collector,
        wanted.documents,
        shard=shard,
        save_every_s=config.save_every_s,
        is_stored=is_stored,
        announce=announce,
        progress=progress,
    )
    if not is_stored() and parts.missing():
        return False
    del collector  # its keys
    with locked(parts.folder / "merge.lock", may_wait=True):
        if not is_stored():
            for module, moment_sum in parts.merged(missing):
                write(wanted.folder, wanted.keys[module], moment_sum)
        shutil.rmtree(parts.folder, ignore_errors=True)
    if (left := parts.folder.parent).exists() and not any(left.iterdir()):
        left.rmdir()
    return True


def _digest(keys: Sequence[MomentKey]) -> str:
    """Names a folder of unfinished sums by everything that decides what its files hold."""
    cut = f"{PARTS} parts, blocks of {BLOCK}"
    return hashlib.sha256("\n".join([cut, *(key.as_json() for key in keys)]).encode()).hexdigest()[
        :20
    ]


def _ignore(*_: object) -> None:
    """Nobody watches."""
