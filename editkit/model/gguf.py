"""The header of a GGUF file: what a network needs to be outlined and a file to be trusted, read
without torch and without the weights.

transformers reads the weights and dequantises them. It drops some of what a header says, and its
errors do not name the file's fault, so the file is checked here first.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from editkit.errors import ConfigError, message
from editkit.lazy import missing_packages
from editkit.model.source import KEY

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # of the weights, unless general.alignment says otherwise
# struct's letters for the types of a value; 8 is a string, 9 an array
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
SCALARS |= {12: "d"}
STRING, ARRAY = 8, 9
# config.model_type by general.architecture, of the families whose modules editkit knows and that
# transformers reads from GGUF
MODEL_TYPES = {
    "bloom": "bloom",
    "falcon": "falcon",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "mistral",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2moe": "qwen2_moe",
    "qwen3": "qwen3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
SIZES = {  # the keys of config.json by those of GGUF, which follow the name of the architecture
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
}
TOKENS = "tokenizer.ggml.tokens"
HEAD = "output.weight"  # missing if the head is tied to the embedding
# scaled rotary positions: of Llama 3.1, of Phi 3
ROTARY_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight")
AGAIN = "download the file again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor's entry in the header."""

    num_values: int
    type: int  # of ggml
    offset: int  # bytes from the first weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The header of a GGUF file. Of an array, `values` holds the length."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    start: int  # of the weights, in bytes

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture"))

    def facts(self) -> dict[str, Any]:
        """The known part of a config.json. The model_type of an unknown architecture is its
        name.
        """
        given = {
            ours: self.values[key]
            for name, ours in SIZES.items()
            if (key := f"{self.architecture}.{name}") in self.values
        }
        vocabulary = self.values.get(f"{self.architecture}.vocab_size", self.values.get(TOKENS, 0))
        return given | {
            "model_type": MODEL_TYPES.get(self.architecture, self.architecture),
            "vocab_size": vocabulary,
            "tie_word_embeddings": HEAD not in self.tensors,
        }


def read_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        ConfigError: not a GGUF file, a version that is not read, or a damaged header.
    """
    if path.stat().st_size < len(MAGIC):  # an empty file cannot be mapped
        raise ConfigError(_not_gguf(path, path.read_bytes()))
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[: len(MAGIC)] != MAGIC:
            raise ConfigError(_not_gguf(path, data[: len(MAGIC)]))
        try:
            return _header(path, _Cursor(data))
        except ConfigError:
            raise
        # Its end, or a number that is none of the format's.
        except (struct.error, KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
            problem = f"the header of {path.name} cannot be read: it is truncated or damaged"
            raise ConfigError(message(KEY, problem, fix=AGAIN)) from None


def file_problems(path: Path, *, any_family: bool, needs_tokenizer: bool) -> list[str]:
    """Why a GGUF file cannot be loaded; empty if nothing is wrong that its header shows.

    Args:
        any_family: the names of the network's modules are given, so the architecture only has to be
            one that transformers reads, which loading shows.
        needs_tokenizer: the tokenizer is the file's own.
    """
    problems = []
    if missing_packages(["gguf"]):
        problems.append(
            message(
                KEY, "the package that reads GGUF files is not installed", fix="pip install gguf"
            )
        )
    try:
        header = read_header(path)
    except ConfigError as error:
        return [*problems, *error.problems]
    if header.architecture not in MODEL_TYPES and not any_family:
        problems.append(
            message(
                KEY,
                f"the architecture of {path.name} is not known",
                got=header.architecture,
                expected=f"one of {', '.join(MODEL_TYPES)}",
                fix="name the modules in model.family, if transformers reads this architecture",
            )
        )
    if needs_tokenizer and TOKENS not in header.values:
        problem = f"{path.name} has no tokenizer"
        fix = "set model.tokenizer to a folder or hub id with the model's tokenizer"
        problems.append(message(KEY, problem, fix=fix))
    if scaling := _rotary_scaling(header):
        problems.append(
            message(
                KEY,
                f"{path.name} scales its rotary positions, which transformers does not read from "
                "GGUF, so that the model would be another one",
                got=scaling,
                fix="load the model from its folder or from the hub",
            )
        )
    return problems or _data_problems(path, header)


def _data_problems(path: Path, header: Header) -> list[str]:
    """Types of tensors that cannot be read, or weights that are missing at the file's end."""
    import gguf

    names = {type_.value: type_.name for type_ in gguf.GGMLQuantizationType}
    used = {tensor.type for tensor in header.tensors.values()}
    unreadable = sorted(names.get(each, str(each)) for each in used if not _is_readable(each))
    if unreadable:
        return [
            message(
                KEY,
                f"{path.name} is quantised in a way that cannot be read",
                got=", ".join(unreadable),
                expected=f"of {', '.join(names[each] for each in names if _is_readable(each))}",
            )
        ]
    sizes = {type_.value: size for type_, size in gguf.GGML_QUANT_SIZES.items()}
    ends = [
        tensor.offset + tensor.num_values // sizes[tensor.type][0] * sizes[tensor.type][1]
        for tensor in header.tensors.values()
    ]
    end = header.start + max(ends, default=0)
    size = path.stat().st_size
    if size < end:
        problem = f"{path.name} is truncated, it ends after {size:,} of {end:,} bytes"
        return [message(KEY, problem, fix=AGAIN)]
    return []


def _is_readable(type_: int) -> bool:
    """Whether the gguf package dequantises this type of ggml. One block of zeros shows it."""
    import gguf
    import numpy

    try:
        kind = gguf.GGMLQuantizationType(type_)
        block = numpy.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=numpy.uint8)
        gguf.dequantize(block, kind)
    except (ValueError, NotImplementedError):
        return False
    return True


def _rotary_scaling(header: Header) -> str | None:
    """What a header says about scaled rotary positions."""
    for name in ROTARY_FACTORS:
        if name in header.tensors:
            return name
    kind = header.values.get(f"{header.architecture}.rope.scaling.type", "none")
    return None if kind == "none" else str(kind)


def _not_gguf(path: Path, start: bytes) -> str:
    problem = f"{path.name} is not a GGUF file"
    return message(KEY, problem, got=start, expected=f"{MAGIC!r} as its first bytes")


class _Cursor:
    """Reads values of the header one after another. Raises struct.error at the file's end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.position = data, len(MAGIC)

    def one(self, letters: str) -> Any:
        values = struct.unpack_from(f"<{letters}", self._data, self.position)
        self.position += struct.calcsize(f"<{letters}")
        return values[0] if len(values) == 1 else values

    def skip(self, num_bytes: int) -> bytes:
        start = self.position
        self.position += num_bytes
        if self.position > len(self._data):
            raise struct.error
        return self._data[start : self.position]

    def string(self) -> str:
        return self.skip(self.one("Q")).decode()

    def value(self, kind: int) -> Any:
        """A value. Of an array the length, because only that of the vocabulary is wanted."""
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            return self.one(SCALARS[kind])
        element, count = self.one("IQ")
        if element in SCALARS:
            self.skip(count * struct.calcsize(f"<{SCALARS[element]}"))
        else:
            for _ in range(count):
                self.value(element)
        return count


def _header(path: Path, cursor: _Cursor) -> Header:
    version = cursor.one("I")
    if version not in VERSIONS:
        raise ConfigError(
            message(
                KEY,
                f"{path.name} is of a version of GGUF that is not read",
                got=version,
                expected=" or ".join(map(str, VERSIONS)),
            )
        )
    num_tensors, num_values = cursor.one("QQ")
    values = {}
    for _ in range(num_values):
        key = cursor.string()
        values[key] = cursor.value(cursor.one("I"))
    tensors = {}
    for _ in range(num_tensors):
        name = cursor.string()
        shape = [cursor.one("Q") for _ in range(cursor.one("I"))]
        kind, offset = cursor.one("IQ")
        tensors[name] = Tensor(num_values=prod(shape), type=kind, offset=offset)
    alignment = values.get("general.alignment", ALIGNMENT)
    start = -(-cursor.position // alignment) * alignment
    return Header(values=values, tensors=tensors, start=start)
