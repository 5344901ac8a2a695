"""Files with second moments that other programs wrote.

The code of ROME, MEMIT, AlphaEdit and EasyEdit keeps the second moment of one matrix in an .npz
file: `mom2.mom2` is the sum of k k^T over the keys, `mom2.count` is the number of keys. Other files
hold the matrix alone; its count has to be given.

Nothing is unpickled but tensors, containers and numbers.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError, message
from editkit.lazy import torch

SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".safetensors")
COUNT = "--count N"
# The names of the sum in published files, and the beginning of the name of its count.
PREFIXES = ("mom2.", "")
CENTRED = "cmom2"


@dataclass(frozen=True, kw_only=True, eq=False)
class Published:
    """The second moment in a published file."""

    sum_II: torch.Tensor  # of k k^T over the keys, in float64
    count: int  # of keys
    dtype: torch.dtype  # of the file


def read_published(path: Path, *, count: int | None = None, is_sum: bool = False) -> Published:
    """The second moment in a file.

    Args:
        count: the number of keys, for a file that does not have it.
        is_sum: a matrix without a name is the sum of k k^T instead of the mean.

    Raises:
        ConfigError: the file is damaged, has another layout, or lacks its count.
    """
    content = _content(path)
    prefix = next((each for each in PREFIXES if f"{each}mom2" in content), None)
    if prefix is not None:
        matrix, is_sum = content[f"{prefix}mom2"], True
        counted = content.get(f"{prefix}count")
    else:
        matrix, counted = _only_matrix(path, content), None
    if not (isinstance(matrix, torch.Tensor) and matrix.is_floating_point()):
        got = matrix.dtype if isinstance(matrix, torch.Tensor) else type(matrix).__name__
        problem = "the second moment is no matrix of floating-point numbers"
        raise ConfigError(message(str(path), problem, got=str(got)))
    number = _count(path, counted, count)
    sum_II = matrix.double() if is_sum else matrix.double() * number
    return Published(sum_II=sum_II, count=number, dtype=matrix.dtype)


def _only_matrix(path: Path, content: Mapping[str, Any]) -> Any:
    if centred := [name for name in content if name.rpartition(".")[2] == CENTRED]:
        problem = "the file has a centred covariance, and editors need the second moment E[k k^T]"
        raise ConfigError(message(str(path), problem, got=centred[0]))
    matrices = [
        name
        for name, value in content.items()
        if isinstance(value, torch.Tensor) and value.ndim == 2
    ]
    if len(matrices) != 1:
        problem = "the file has no second moment" if not matrices else "the file has many matrices"
        names = ", ".join(list(content)[:8]) or "nothing"
        expected = "mom2.mom2 with mom2.count, or one matrix"
        raise ConfigError(message(str(path), problem, got=names, expected=expected))
    return content[matrices[0]]


def _count(path: Path, stored: Any, given: int | None) -> int:
    """The number of keys, from the file or the command."""
    if stored is None:
        if given is None:
            problem = "the file does not say how many keys it is about"
            raise ConfigError(message(str(path), problem, fix=f"state it: {COUNT}"))
        return given
    number = float(stored) if _is_number(stored) else None
    if number is None or not number.is_integer() or number < 1:
        problem = "the count of keys is not a positive whole number"
        raise ConfigError(message(str(path), problem, got=number))
    if given not in (None, int(number)):
        problem = "the file has another count of keys than --count"
        raise ConfigError(message(str(path), problem, got=given, expected=str(int(number))))
    return int(number)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, torch.Tensor) and value.numel() == 1 and not value.is_complex()
    )


def _content(path: Path) -> dict[str, Any]:
    """The tensors and numbers of a file by name. A value without a name has the name ""."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix in (".pt", ".pth"):
            return _unpickled(path)
        return dict(_arrays(path))
    except ConfigError:
        raise
    except (OSError, EOFError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(_unreadable(path, error)) from None
    except (zipfile.BadZipFile, zlib.error, SafetensorError) as error:
        raise ConfigError(_unreadable(path, error)) from None


def _arrays(path: Path) -> Iterator[tuple[str, Any]]:
    """The numeric arrays of an .npz or .npy file. Texts, such as the names of classes, are left
    out.
    """
    import numpy

    loaded = numpy.load(path, allow_pickle=False)
    whole: Mapping[str, Any] = {"": loaded} if isinstance(loaded, numpy.ndarray) else loaded
    for name in whole:
        array = whole[name]
        if array.dtype.kind in "iuf":
            yield name, torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))


def _unpickled(path: Path) -> dict[str, Any]:
    """The content of a pickled file. Nothing but tensors, containers and numbers is loaded, and no
    code of the file runs.
    """
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle may raise any error
        if isinstance(error, OSError):
            raise
        raise ConfigError(
            message(
                str(path),
                "the file is damaged, or holds more than tensors and numbers, which is not loaded",
                got=type(error).__name__,
                fix="save the matrix alone, best as .safetensors",
            )
        ) from None
    return dict(loaded) if isinstance(loaded, Mapping) else {"": loaded}


def _unreadable(path: Path, error: Exception) -> str:
    text = " ".join(str(error).split())[:120] or type(error).__name__
    if "allow_pickle" in str(error):  # numpy advises to load it unsafely
        text = "it is damaged, or holds pickled objects, which are not loaded"
    return message(str(path), f"the file cannot be read: {text}")
