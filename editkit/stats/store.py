"""Second moments of keys on disk: computed once for a model and a corpus, found again by content, never trusted unchecked.

A file's name is a digest of everything that its content depends on (`MomentKey`). The same key lies inside the file beside a checksum, so
that a damaged, renamed or foreign file is an error and not a wrong result.

Shape letters: I d_in, N keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from editkit.errors import ConfigError
from editkit.files import write_atomically
from editkit.lazy import torch
from editkit.stats.collect import MomentSum, collect
from editkit.stats.corpus import StatsConfig, digest, texts

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

SUFFIX = ".safetensors"
REMEDY = "Delete the file: it is computed again by the next run or `editkit stats build`."


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentKey:
    """Every input that can change a second moment; the file's name is its digest."""

    model: str  # the name, for who reads a listing; `fingerprint` is what identifies it
    fingerprint: str  # of the unedited weights
    module: str
    corpus: str  # digest of the texts themselves
    num_documents: int
    context_length: int  # tokens of a document that count
    dtype: str  # of the network
    format: int = 1

    @property
    def file_name(self) -> str:
        return f"{self.module}-{hashlib.sha256(self.as_json().encode()).hexdigest()[:20]}{SUFFIX}"

    def as_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """E[k k^T] of the keys of one matrix, uncentred, in float64, and its Cholesky factor."""

    module: str
    matrix_II: torch.Tensor
    num_tokens: int
    checksum: str = ""  # of the stored file

    @cached_property
    def factor_II(self) -> torch.Tensor:
        """Lower triangular; computed at the first use (I^3 / 3 operations). Raises ConfigError where the matrix is singular."""
        size = self.matrix_II.shape[0]
        factor_II, failed_at = torch.linalg.cholesky_ex(self.matrix_II)
        # Of N keys the rank is at most N, but rounding can hide that from the factorisation.
        if self.num_tokens < size or int(failed_at) != 0:
            raise ConfigError(
                f"stats: the second moment of {self.module} cannot be inverted - it holds {self.num_tokens} keys of length {size} - "
                "raise stats.num_documents, or do without it (ROME: editor.covariance=null)."
            )
        return factor_II


@dataclass(frozen=True, eq=False)
class Moments:
    """The second moments that an editor asked for, by module; empty where it asked for none."""

    by_module: Mapping[str, SecondMoment] = field(default_factory=dict)

    def second_moment(self, module: str) -> torch.Tensor:
        """E[k k^T], (I, I) float64; not to be modified."""
        return self._of(module).matrix_II

    def inverse_times(self, module: str, keys_IN: torch.Tensor) -> torch.Tensor:
        """E[k k^T]^-1 @ keys, float64, on the keys' device: two triangular solves, the factorisation is done once."""
        factor_II = self._of(module).factor_II
        return torch.cholesky_solve(keys_IN.to(factor_II), factor_II).to(keys_IN.device)

    def factorise(self, module: str) -> None:
        """Does now what `inverse_times` would do at its first use. Raises ConfigError where the matrix is singular."""
        _ = self._of(module).factor_II

    @property
    def digests(self) -> dict[str, str]:
        """Checksum of each module's file, for the provenance."""
        return {module: moment.checksum for module, moment in self.by_module.items()}

    def _of(self, module: str) -> SecondMoment:
        assert module in self.by_module, f"no second moment of {module}: the editor's moment_modules did not ask for it"
        return self.by_module[module]


def build(model: EditableModel, modules: Sequence[str], config: StatsConfig, *, progress: Callable[[int], None] | None = None) -> Moments:
    """The second moments of `modules`: those stored are read and checked, the missing ones are collected in one pass and stored.

    `progress` is told the number of documents done. Raises ConfigError for a corrupt file, or a source that cannot be read.
    """
    if not modules:
        return Moments()
    if config.source == "none":
        raise ConfigError(f"stats=none, but the editor needs the second moments of {', '.join(modules)} - choose stats=world|text|hub.")
    documents = tuple(texts(config))
    keys = moment_keys(model, modules, config, documents)
    folder = Path(config.folder).expanduser()
    missing = [module for module in modules if not (folder / keys[module].file_name).exists()]
    if missing:
        # Differs from published code, which computes missing statistics on whatever the model has become.
        assert not any(model.total(module).rank for module in model.edited_modules), "second moments are taken on the unedited model"
        sums = collect(
            model, missing, documents, context_length=keys[missing[0]].context_length, batch_tokens=config.batch_tokens, progress=progress
        )
        for module, moment_sum in sums.items():
            write(folder, keys[module], moment_sum)
    return Moments({module: read(folder / keys[module].file_name, keys[module], device=model.device) for module in modules})


def moment_keys(model: EditableModel, modules: Sequence[str], config: StatsConfig, documents: Sequence[str]) -> dict[str, MomentKey]:
    """The key of each module's file."""
    corpus = digest(documents)
    return {
        module: MomentKey(
            model=model.name,
            fingerprint=model.fingerprint,
            module=module,
            corpus=corpus,
            num_documents=len(documents),
            context_length=min(config.context_length, model.max_length),
            dtype=str(model.dtype).removeprefix("torch."),
        )
        for module in modules
    }


def write(folder: Path, key: MomentKey, moment_sum: MomentSum) -> Path:
    """Stores one second moment under its key."""
    from safetensors.torch import save

    tensors = {"sum_II": moment_sum.sum_II.cpu().contiguous(), "num_tokens": torch.tensor(moment_sum.num_tokens)}
    path = folder / key.file_name
    write_atomically(path, save(tensors, metadata={"key": key.as_json(), "checksum": _checksum(key, tensors)}))
    return path


def read(path: Path, key: MomentKey | None = None, *, device: torch.device | str = "cpu") -> SecondMoment:
    """One stored second moment. Raises ConfigError where the file is damaged, or holds another key than `key`."""
    stored, tensors, checksum = _load(path)
    if key is not None and stored != key:
        differing = ", ".join(name for name, value in asdict(key).items() if value != getattr(stored, name))
        raise ConfigError(f"corrupt statistics: {path} holds the second moment of something else ({differing} differ). {REMEDY}")
    num_tokens = int(tensors["num_tokens"])
    return SecondMoment(stored.module, (tensors["sum_II"] / num_tokens).to(device), num_tokens, checksum)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMoment:
    """A line of `editkit stats ls`; `problem` is None for a sound file."""

    path: Path
    num_bytes: int
    key: MomentKey | None = None
    num_tokens: int | None = None
    problem: str | None = None


def verify(folder: str | Path) -> list[StoredMoment]:
    """Reads every file of the store completely and checks name, key and checksum."""
    found = []
    for path in sorted(Path(folder).expanduser().glob(f"*{SUFFIX}")):
        num_bytes = path.stat().st_size
        try:
            key, tensors, _ = _load(path)
            problem = None if path.name == key.file_name else f"corrupt statistics: {path} is not named after its key. {REMEDY}"
            found.append(StoredMoment(path=path, num_bytes=num_bytes, key=key, num_tokens=int(tensors["num_tokens"]), problem=problem))
        except ConfigError as error:
            found.append(StoredMoment(path=path, num_bytes=num_bytes, problem=str(error)))
    return found


def list_stored(folder: str | Path) -> list[StoredMoment]:
    """What the store holds, by the files' headers alone: quick, and blind to damage in the numbers."""
    from safetensors import safe_open

    found = []
    for path in sorted(Path(folder).expanduser().glob(f"*{SUFFIX}")):
        num_bytes = path.stat().st_size
        try:
            with safe_open(path, framework="pt") as opened:
                key, num_tokens = MomentKey(**json.loads(opened.metadata()["key"])), int(opened.get_tensor("num_tokens"))
            found.append(StoredMoment(path=path, num_bytes=num_bytes, key=key, num_tokens=num_tokens))
        except Exception as error:  # whatever a damaged header raises, the listing goes on
            found.append(
                StoredMoment(path=path, num_bytes=num_bytes, problem=f"corrupt statistics: {path} cannot be read ({error}). {REMEDY}")
            )
    return found


def _load(path: Path) -> tuple[MomentKey, dict[str, torch.Tensor], str]:
    """A file's key, tensors and checksum, verified."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
        key, checksum = MomentKey(**json.loads(metadata["key"])), metadata["checksum"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"corrupt statistics: {path} cannot be read ({error}). {REMEDY}") from None
    if checksum != _checksum(key, tensors):
        raise ConfigError(f"corrupt statistics: {path} does not match its checksum. {REMEDY}")
    return key, tensors, checksum


def _checksum(key: MomentKey, tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of the key and of every tensor's name, shape and bytes."""
    total = hashlib.sha256(key.as_json().encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()
