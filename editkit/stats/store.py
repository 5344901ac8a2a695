"""Second moments of keys on disk: computed once for a model and a corpus, and verified when they
are read.

A file's name contains a digest of everything that its content depends on (`MomentKey`). The file
also contains this key and a checksum, so that a damaged, renamed or foreign file gives an error
instead of a wrong result.

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

from editkit.errors import ConfigError, message
from editkit.files import written_atomically
from editkit.lazy import torch
from editkit.linalg.recursive import SolveDtype
from editkit.stats.collect import MomentSum

SUFFIX = ".safetensors"
FORMAT = 2  # format 1 had no `products` and other blocks of sums
FIX = "delete the file; the next run or `editkit stats build` computes it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class MomentKey:
    """All inputs that can change a second moment. Their digest is part of the file's name."""

    model: str  # the name in listings; `fingerprint` identifies the model
    fingerprint: str  # of the unedited weights
    module: str
    corpus: str  # digest of the texts themselves
    num_documents: int
    context_length: int  # tokens of a document that count
    dtype: str  # of the network
    products: str  # the dtype of the products k k^T; sums are float64
    format: int = FORMAT
    # the name of the file that somebody else published; None: editkit computed the second moment
    imported: str | None = None

    @property
    def file_name(self) -> str:
        digest = hashlib.sha256(self.as_json().encode()).hexdigest()[:20]
        return f"{'imported-' if self.imported else ''}{self.module}-{digest}{SUFFIX}"

    def as_json(self) -> str:
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(fields, sort_keys=True)


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """The uncentred second moment E[k k^T] of the keys of one matrix, in float64, and its Cholesky
    factor.
    """

    module: str
    matrix_II: torch.Tensor
    num_tokens: int
    checksum: str = ""  # of the stored file
    dtype: SolveDtype = "float64"  # of the factor
    imported: str | None = None  # the file that somebody else published, as in `MomentKey`
    source_digest: str | None = None  # of that file
    # moves the factor to its storage; None: on the matrix's device
    keep: Callable[[torch.Tensor], torch.Tensor] | None = None

    @cached_property
    def factor_II(self) -> torch.Tensor:
        """The lower triangular Cholesky factor in `dtype`.

        The first use computes it in float64 with I^3 / 3 operations. Raises ConfigError for a
        singular matrix.
        """
        size = self.matrix_II.shape[0]
        factor_II, failed_at = torch.linalg.cholesky_ex(self.matrix_II)
        # The rank is at most the number of keys, but rounding can hide that from the factorisation.
        if self.num_tokens < size or int(failed_at) != 0:
            more = "import one of more keys" if self.imported else "raise stats.num_documents"
            raise ConfigError(
                message(
                    "stats",
                    f"the second moment of {self.module} cannot be inverted",
                    got=f"{self.num_tokens} keys of length {size}",
                    fix=f"{more}, or edit without second moments (ROME: editor.covariance=null)",
                )
            )
        # float32 is not accurate enough to factorise an ill-conditioned matrix.
        factor_II = factor_II.to(getattr(torch, self.dtype))
        return factor_II if self.keep is None else self.keep(factor_II)


@dataclass(frozen=True, eq=False)
class Moments:
    """The second moments that an editor needs, by module; empty if it needs none."""

    by_module: Mapping[str, SecondMoment] = field(default_factory=dict)
    # `solve.dtype`, the dtype of the I x I matrices in solves; second moments are float64
    dtype: SolveDtype = "float64"
    documents: tuple[str, ...] = ()  # that they were collected over; none for imported ones

    def solved_in(self, dtype: SolveDtype) -> Moments:
        """The same second moments for least squares in another dtype."""
        return Moments(
            {module: replace(moment, dtype=dtype) for module, moment in self.by_module.items()},
            dtype,
            self.documents,
        )

    def factorise_all(self) -> None:
        """Factorises every second moment. Raises ConfigError for one that cannot be inverted."""
        for module in self.by_module:
            self.factorise(module)

    def second_moment(self, module: str) -> torch.Tensor:
        """E[k k^T], (I, I) float64. Callers must not modify it."""
        return self._of(module).matrix_II

    def inverse_times(self, module: str, keys_IN: torch.Tensor) -> torch.Tensor:
        """E[k k^T]^-1 @ keys in float64 on the keys' device, by two triangular solves in `dtype`.

        The factorisation is computed once.
        """
        return self.unwhiten(module, self.whiten(module, keys_IN))

    def whiten(self, module: str, keys_IN: torch.Tensor) -> torch.Tensor:
        """L^-1 @ keys with E[k k^T] = L L^T, in float64 on the keys' device. It whitens the keys of
        common text.
        """
        factor_II = self._of(module).factor_II
        # `cholesky_solve` copies the factor, which takes 25 times as long for one column.
        white_IN: torch.Tensor = torch.linalg.solve_triangular(
            factor_II, keys_IN.to(factor_II), upper=False
        ).to(device=keys_IN.device, dtype=torch.float64)
        return white_IN

    def unwhiten(self, module: str, white_IN: torch.Tensor) -> torch.Tensor:
        """L^-T @ white_IN, with L as in `whiten`."""
        factor_II = self._of(module).factor_II
        product_IN: torch.Tensor = torch.linalg.solve_triangular(
            factor_II.T, white_IN.to(factor_II), upper=True
        ).to(device=white_IN.device, dtype=torch.float64)
        return product_IN

    def factorise(self, module: str) -> None:
        """Computes the factor before its first use. Raises ConfigError for a singular matrix."""
        _ = self._of(module).factor_II

    @property
    def digests(self) -> dict[str, str]:
        """The checksum of each module's file, for the provenance."""
        return {module: moment.checksum for module, moment in self.by_module.items()}

    @property
    def imported(self) -> dict[str, str]:
        """The file that somebody else published, by module, for those that were imported."""
        return {
            module: moment.imported for module, moment in self.by_module.items() if moment.imported
        }

    def _of(self, module: str) -> SecondMoment:
        assert module in self.by_module, (
            f"no second moment of {module}: the editor's moment_modules do not contain it"
        )
        return self.by_module[module]


def mapped_into(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that moves a tensor into a memory-mapped file in the folder.

    The file disappears with the process. If memory is short, the system may drop its pages, and it
    reads them again at their next use.
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
    """Stores one second moment under its key. Returns the file."""
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
    """One stored second moment.

    Args:
        key: the expected key; not checked if None.
        keep: moves the matrix and the factor to their storage.

    Raises:
        ConfigError: the file is damaged, or has another key.
    """
    stored, tensors, checksum = _load(path)
    if key is not None and stored != key:
        differing = ", ".join(
            name for name, value in asdict(key).items() if value != getattr(stored, name)
        )
        raise ConfigError(
            _corrupt(path, f"the file has the second moment of another key ({differing} differ)")
        )
    num_tokens = int(tensors["num_tokens"])
    matrix_II = tensors.pop("sum_II").to(device) / num_tokens
    return SecondMoment(
        stored.module,
        matrix_II if keep is None else keep(matrix_II),
        num_tokens,
        checksum,
        imported=stored.imported,
        source_digest=stored.corpus if stored.imported else None,
        keep=keep,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMoment:
    """A row of `editkit stats ls`; `problem` is None for an intact file."""

    path: Path
    num_bytes: int
    key: MomentKey | None = None
    num_tokens: int | None = None
    problem: str | None = None


def verify(folder: str | Path) -> list[StoredMoment]:
    """All files of the store. Every file is read completely, and its name, key and checksum are
    checked.
    """
    stored = []
    for path in sorted(Path(folder).expanduser().glob(f"*{SUFFIX}")):
        num_bytes = path.stat().st_size
        try:
            key, tensors, _ = _load(path)
            problem = (
                None
                if path.name == key.file_name
                else _corrupt(path, "the file name does not belong to its key")
            )
            stored.append(
                StoredMoment(
                    path=path,
                    num_bytes=num_bytes,
                    key=key,
                    num_tokens=int(tensors["num_tokens"]),
                    problem=problem,
                )
            )
        except ConfigError as error:
            stored.append(StoredMoment(path=path, num_bytes=num_bytes, problem=str(error)))
    return stored


def list_stored(folder: str | Path) -> list[StoredMoment]:
    """All files of the store, from their headers only. This is fast, and does not detect damaged
    numbers.
    """
    from safetensors import safe_open

    stored = []
    for path in sorted(Path(folder).expanduser().glob(f"*{SUFFIX}")):
        num_bytes = path.stat().st_size
        try:
            with safe_open(path, framework="pt") as opened:
                key, num_tokens = _key(opened.metadata()), int(opened.get_tensor("num_tokens"))
            stored.append(
                StoredMoment(path=path, num_bytes=num_bytes, key=key, num_tokens=num_tokens)
            )
        except Exception as error:  # a damaged header may raise any error; the listing continues
            stored.append(
                StoredMoment(
                    path=path,
                    num_bytes=num_bytes,
                    problem=_corrupt(path, f"the file cannot be read: {error}"),
                )
            )
    return stored


def _load(path: Path) -> tuple[MomentKey, dict[str, torch.Tensor], str]:
    """The verified key, tensors and checksum of a file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is no mapping)
        key, checksum = _key(metadata), metadata["checksum"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(_corrupt(path, f"the file cannot be read: {error}")) from None
    if checksum != _checksum(key, tensors):
        raise ConfigError(_corrupt(path, "the file does not match its checksum"))
    return key, tensors, checksum


def _key(metadata: Mapping[str, str]) -> MomentKey:
    fields: dict[str, Any] = json.loads(metadata["key"])
    if fields["format"] != FORMAT:
        raise ValueError(
            f"another version of editkit wrote it in format {fields['format']}, expected {FORMAT}"
        )
    return MomentKey(**fields)


def _corrupt(path: Path, problem: str) -> str:
    return message(str(path), f"corrupt statistics, {problem}", fix=FIX)


def _checksum(key: MomentKey, tensors: Mapping[str, torch.Tensor]) -> str:
    """A digest of the key and of every tensor's name, shape and bytes."""
    total = hashlib.sha256(key.as_json().encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().numpy().data)
    return total.hexdigest()
