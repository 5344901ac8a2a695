"""Second moments of keys on disk: computed once for a model and a corpus, found again by content,
never trusted unchecked.

A file's name is a digest of everything that its content depends on (`MomentKey`). The same key lies
inside the file beside a checksum, so that a damaged, renamed or foreign file is an error and not a
wrong result.

Shape letters: I d_in, N keys.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError
from editkit.files import written_atomically
from editkit.lazy import torch
from editkit.linalg.recursive import SolveDtype
from editkit.stats.collect import MomentSum

SUFFIX = ".safetensors"
FORMAT = 2  # 1 had no `products`, and its sums were cut differently
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
    products: str  # what k k^T was multiplied in; sums are float64
    format: int = FORMAT

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
    dtype: SolveDtype = "float64"  # of the factor
    # puts the factor where it shall lie; None: beside the matrix
    keep: Callable[[torch.Tensor], torch.Tensor] | None = None

    @cached_property
    def factor_II(self) -> torch.Tensor:
        """Lower triangular; computed in float64 at the first use (I^3 / 3 operations), kept in
        `dtype`.

        Raises ConfigError where the matrix is singular.
        """
        size = self.matrix_II.shape[0]
        factor_II, failed_at = torch.linalg.cholesky_ex(self.matrix_II)
        # Of N keys the rank is at most N, but rounding can hide that from the factorisation.
        if self.num_tokens < size or int(failed_at) != 0:
            raise ConfigError(
                f"stats: the second moment of {self.module} cannot be inverted - it holds "
                f"{self.num_tokens} keys of length {size} - "
                "raise stats.num_documents, or do without it (ROME: editor.covariance=null)."
            )
        factor_II = factor_II.to(
            getattr(torch, self.dtype)
        )  # float32 could not factorise what is ill-conditioned
        return factor_II if self.keep is None else self.keep(factor_II)


@dataclass(frozen=True, eq=False)
class Moments:
    """The second moments that an editor asked for, by module; empty where it asked for none."""

    by_module: Mapping[str, SecondMoment] = field(default_factory=dict)
    # `solve.dtype`: of the I x I matrices that solves are made from; the second moments stay
    # float64
    dtype: SolveDtype = "float64"

    def solved_in(self, dtype: SolveDtype) -> Moments:
        """The same, for least squares in another dtype."""
        return Moments(
            {module: replace(moment, dtype=dtype) for module, moment in self.by_module.items()},
            dtype,
        )

    def second_moment(self, module: str) -> torch.Tensor:
        """E[k k^T], (I, I) float64; not to be modified."""
        return self._of(module).matrix_II

    def inverse_times(self, module: str, keys_IN: torch.Tensor) -> torch.Tensor:
        """E[k k^T]^-1 @ keys, float64, on the keys' device: two triangular solves in `dtype`, the
        factorisation is done once.
        """
        return self.unwhiten(module, self.whiten(module, keys_IN))

    def whiten(self, module: str, keys_IN: torch.Tensor) -> torch.Tensor:
        """L^-1 @ keys with E[k k^T] = L L^T, float64, on the keys' device: what common text's keys
        become white by.
        """
        factor_II = self._of(module).factor_II
        # Not `cholesky_solve`: it copies the factor, which for one column takes 25 times as long.
        result: torch.Tensor = torch.linalg.solve_triangular(
            factor_II, keys_IN.to(factor_II), upper=False
        ).to(device=keys_IN.device, dtype=torch.float64)
        return result

    def unwhiten(self, module: str, white_IN: torch.Tensor) -> torch.Tensor:
        """L^-T @ it, as `whiten`."""
        factor_II = self._of(module).factor_II
        result: torch.Tensor = torch.linalg.solve_triangular(
            factor_II.T, white_IN.to(factor_II), upper=True
        ).to(device=white_IN.device, dtype=torch.float64)
        return result

    def factorise(self, module: str) -> None:
        """Does now what `inverse_times` would do at its first use. Raises ConfigError where the
        matrix is singular.
        """
        _ = self._of(module).factor_II

    @property
    def digests(self) -> dict[str, str]:
        """Checksum of each module's file, for the provenance."""
        return {module: moment.checksum for module, moment in self.by_module.items()}

    def _of(self, module: str) -> SecondMoment:
        assert module in self.by_module, (
            f"no second moment of {module}: the editor's moment_modules did not ask for it"
        )
        return self.by_module[module]


def mapped_into(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that moves a tensor into a file below the folder, which is mapped into memory and
    goes with the process.

    The system may drop its pages whenever memory is short, and reads them again when they are used.
    """

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix="mapped-") as file:
            flat = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
        mapped = flat.view(tensor.shape)
        mapped.copy_(tensor)
        return mapped

    return keep


def write(folder: Path, key: MomentKey, moment_sum: MomentSum) -> Path:
    """Stores one second moment under its key."""
    from safetensors.torch import save_file

    tensors = {
        "sum_II": moment_sum.sum_II.cpu().contiguous(),
        "num_tokens": torch.tensor(moment_sum.num_tokens),
    }
    path = folder / key.file_name
    with written_atomically(path) as temporary:
        save_file(
            tensors, temporary, metadata={"key": key.as_json(), "checksum": _checksum(key, tensors)}
        )
    return path


def read(
    path: Path,
    key: MomentKey | None = None,
    *,
    device: torch.device | str = "cpu",
    keep: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> SecondMoment:
    """One stored second moment; `keep` moves matrix and factor to where they shall lie.

    Raises ConfigError where the file is damaged, or holds another key than `key`.
    """
    stored, tensors, checksum = _load(path)
    if key is not None and stored != key:
        differing = ", ".join(
            name for name, value in asdict(key).items() if value != getattr(stored, name)
        )
        raise ConfigError(
            f"corrupt statistics: {path} holds the second moment of something else ({differing} "
            f"differ). {REMEDY}"
        )
    num_tokens = int(tensors["num_tokens"])
    matrix_II = tensors.pop("sum_II").to(device) / num_tokens
    return SecondMoment(
        stored.module,
        matrix_II if keep is None else keep(matrix_II),
        num_tokens,
        checksum,
        keep=keep,
    )


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
            problem = (
                None
                if path.name == key.file_name
                else f"corrupt statistics: {path} is not named after its key. {REMEDY}"
            )
            found.append(
                StoredMoment(
                    path=path,
                    num_bytes=num_bytes,
                    key=key,
                    num_tokens=int(tensors["num_tokens"]),
                    problem=problem,
                )
            )
        except ConfigError as error:
            found.append(StoredMoment(path=path, num_bytes=num_bytes, problem=str(error)))
    return found


def list_stored(folder: str | Path) -> list[StoredMoment]:
    """What the store holds, by the files' headers alone: quick, and blind to damage in the
    numbers.
    """
    from safetensors import safe_open

    found = []
    for path in sorted(Path(folder).expanduser().glob(f"*{SUFFIX}")):
        num_bytes = path.stat().st_size
        try:
            with safe_open(path, framework="pt") as opened:
                key, num_tokens = _key(opened.metadata()), int(opened.get_tensor("num_tokens"))
            found.append(
                StoredMoment(path=path, num_bytes=num_bytes, key=key, num_tokens=num_tokens)
            )
        except Exception as error:  # whatever a damaged header raises, the listing goes on
            found.append(
                StoredMoment(
                    path=path,
                    num_bytes=num_bytes,
                    problem=f"corrupt statistics: {path} cannot be read ({error}). {REMEDY}",
                )
            )
    return found


def _load(path: Path) -> tuple[MomentKey, dict[str, torch.Tensor], str]:
    """A file's key, tensors and checksum, verified."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
        key, checksum = _key(metadata), metadata["checksum"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"corrupt statistics: {path} cannot be read ({error}). {REMEDY}"
        ) from None
    if checksum != _checksum(key, tensors):
        raise ConfigError(f"corrupt statistics: {path} does not match its checksum. {REMEDY}")
    return key, tensors, checksum


def _key(metadata: Mapping[str, str]) -> MomentKey:
    fields: dict[str, Any] = json.loads(metadata["key"])
    if fields["format"] != FORMAT:
        raise ValueError(
            f"it has format {fields['format']}, of another version of editkit; this one writes "
            f"{FORMAT}"
        )
    return MomentKey(**fields)


def _checksum(key: MomentKey, tensors: Mapping[str, torch.Tensor]) -> str:
    """Digest of the key and of every tensor's name, shape and bytes."""
    total = hashlib.sha256(key.as_json().encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()
