"""Second moments that somebody else computed: checked, stored, and found again for a run.

An imported second moment belongs to the model that it was imported for, by its fingerprint. Its key
has the name and the digest of the published file in place of a corpus.

Shape letters: I d_in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from editkit.datasets.facts_table import read_table, statements
from editkit.errors import ConfigError, message
from editkit.files import file_digest
from editkit.lazy import torch
from editkit.model.capture import capture
from editkit.model.tokens import pad
from editkit.stats.collect import MomentSum
from editkit.stats.published import SUFFIXES, Published, read_published
from editkit.stats.store import MomentKey, list_stored, write

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.stats.corpus import StatsConfig

COMMAND = "editkit stats import"
ROWS_AT_ONCE = 1024  # bounds the copies of a comparison of a matrix with its transpose
# How much longer or shorter than the model's own keys those of a file may be, squared, before the
# import warns. A sum that is taken for a mean is off by the number of keys.
LONGER = 30
STATEMENTS = 20  # sentences of the short text
ASYMMETRY = 100  # entries and their mirror images may differ by so many roundings
ROUNDING = 4  # of the trace: how negative an eigenvalue may be, in roundings of the file's dtype
# What published files are called: the matrix's name, then dtype, kind and number of documents.
DESCRIPTION = re.compile(r"_(?:b?float\d+)_.*$")
DOCUMENTS = re.compile(r"_(\d+)$")
LAYER = re.compile(r"(?:(?:^|[._-])(?:h|layers?|blocks?)[._-]?|^)(\d+)(?![^\W_])")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """A second moment that was imported."""

    path: Path  # the published file
    key: MomentKey
    count: int  # of keys
    is_definite: bool  # and can be inverted
    # mean |k|^2 in the file, in units of that of the model's own keys in a short text
    length: float

    @property
    def is_odd(self) -> bool:
        """Whether the keys are so long or short that they hardly are those of this matrix."""
        return not 1 / LONGER <= self.length <= LONGER


def import_moments(
    model: EditableModel,
    path: Path,
    folder: Path,
    *,
    layer: int | None = None,
    count: int | None = None,
    is_sum: bool = False,
    announce: Callable[[str], None] | None = None,
) -> list[Imported]:
    """Checks the published files and stores their second moments for `model`.

    Args:
        path: a file, or a folder of files that are named after their matrices or layers.
        folder: the store.
        layer: of a file whose name does not tell it.
        count: the number of keys, for files that do not have it.
        is_sum: a matrix without a name is a sum instead of a mean.
        announce: gets a sentence about each file that is left out.

    Raises:
        ConfigError: with the problems of all files. Files without problems are imported.
    """
    files = files_by_module(model, path, layer=layer, announce=announce)
    done: list[Imported] = []
    problems: list[str] = []
    for module, file in files.items():
        try:
            done.append(_import(model, module, file, folder, count=count, is_sum=is_sum))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    return done


def imported_keys(
    model: EditableModel, modules: Sequence[str], config: StatsConfig
) -> dict[str, MomentKey]:
    """The keys of the imports for these modules: of the files at `stats.path`, which are imported
    if necessary, or the newest import of each module.

    Raises:
        ConfigError: there is no import of a module, or a file at `stats.path` cannot be imported.
    """
    folder = Path(config.folder).expanduser()
    if config.path is None:
        found = _newest(model, folder)
    else:
        files = files_by_module(model, Path(config.path).expanduser())
        chosen = {module: file for module, file in files.items() if module in modules}
        found = {
            module: _stored(model, module, file, folder) or _import(model, module, file, folder).key
            for module, file in chosen.items()
        }
    if missing := [module for module in modules if module not in found]:
        place = f"at {config.path}" if config.path else "for these weights and this dtype"
        raise ConfigError(
            message(
                "stats",
                f"no imported second moment of {', '.join(missing)}",
                got=place,
                fix=f"{COMMAND} <file or folder> model={model.name}",
            )
        )
    return {module: found[module] for module in modules}


def lacking(config: StatsConfig, model: str) -> list[str]:
    """What a run with imported second moments lacks, as far as that is known before the model of
    that name is loaded.
    """
    if config.source != "imported":
        return []
    if config.path is not None:
        return not_there(Path(config.path).expanduser(), key="stats.path")
    stored = list_stored(config.folder)
    if any(each.key and each.key.imported and each.key.model == model for each in stored):
        return []
    problem, fix = "no second moment was imported", f"{COMMAND} <file or folder> model={model}"
    return [message("stats", f"{problem} for {model}", got="imported", fix=fix)]


def files_by_module(
    model: EditableModel,
    path: Path,
    *,
    layer: int | None = None,
    announce: Callable[[str], None] | None = None,
) -> dict[str, Path]:
    """The published files by the matrix that their names stand for.

    Raises:
        ConfigError: there is no such file, a name stands for no matrix of the model, or two files
            for the same one.
    """
    if problems := not_there(path, key=COMMAND):
        raise ConfigError(problems)
    files = [path] if path.is_file() else _files_in(path)
    if layer is not None:
        if len(files) > 1:
            raise ConfigError(
                message("--layer", "is about one file", got=str(path), fix="name the file")
            )
        if not 0 <= layer < model.num_layers:
            expected = f"0 to {model.num_layers - 1}"
            problem = f"{model.name} does not have this layer"
            raise ConfigError(message("--layer", problem, got=layer, expected=expected))
        return {model.down_projections([layer])[0]: files[0]}
    matrices = _matrices(model)
    by_module: dict[str, list[Path]] = {}
    left_out: list[Path] = []
    problems = []
    for file in files:
        name = DESCRIPTION.sub("", file.name.removesuffix(file.suffix))
        module = _module_of(name, model, matrices)
        if module is not None:
            by_module.setdefault(module, []).append(file)
        elif _layer_of(name) is None:
            left_out.append(file)
        else:
            expected = f"names like {model.down_projections([0])[0]}"
            problem = f"{model.name} ({model.num_layers} layers) has no such matrix"
            problems.append(message(str(file), problem, got=name, expected=expected))
    for module, several in by_module.items():
        if len(several) > 1:
            names = ", ".join(each.name for each in several)
            problem, fix = (
                f"several files are about {module}",
                "name the file instead of the folder",
            )
            problems.append(message(str(path), problem, got=names, fix=fix))
    if not problems and not by_module:
        expected = "a name like transformer.h.17.mlp.c_proj_float32_mom2_100000.npz"
        problem, fix = "no file is named after a layer", "name one file, and its layer: --layer N"
        problems = [message(str(path), problem, expected=expected, fix=fix)]
    if problems:
        raise ConfigError(problems)
    if announce is not None:
        for file in left_out:
            announce(f"left out, as its name has no layer: {file}")
    return {module: several[0] for module, several in by_module.items()}


def _files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())


def not_there(path: Path, *, key: str) -> list[str]:
    """Why nothing can be imported from a path, before its files are read."""
    suffixes = ", ".join(SUFFIXES)
    if path.is_dir():
        if _files_in(path):
            return []
        return [message(key, "the folder has no such file", got=str(path), expected=suffixes)]
    if not path.is_file():
        return [message(key, "no such file or folder", got=str(path))]
    if path.suffix not in SUFFIXES:
        return [message(key, "unknown type of file", got=path.name, expected=suffixes)]
    return []


def _matrices(model: EditableModel) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    return {
        name
        for name, module in model.network.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }


def _module_of(name: str, model: EditableModel, matrices: Collection[str]) -> str | None:
    """The matrix that the name of a file stands for: its own name, or a layer's number. A name with
    dots is that of a module, and stands for no other one.
    """
    if name in matrices:
        return name
    layer = _layer_of(name)
    if layer is None or name.count(".") > 1 or layer >= model.num_layers:
        return None
    return model.down_projections([layer])[0]


def _layer_of(name: str) -> int | None:
    found = LAYER.search(name)
    return int(found[1]) if found else None


def _corpus(file: Path, count: int | None, *, is_sum: bool) -> str:
    """What stands in a key for the texts: the file's digest, and what the command said about it."""
    said = "" if count is None else f", a {'sum' if is_sum else 'mean'} over {count} keys"
    return f"sha256 {file_digest(file)}{said}"


def _newest(model: EditableModel, folder: Path, corpus: str = "") -> Mapping[str, MomentKey]:
    """The key of the newest import of each module, from files with this digest if one is given."""
    stored = sorted(list_stored(folder), key=lambda each: each.path.stat().st_mtime_ns)
    keys = [each.key for each in stored if each.key is not None and each.key.imported]
    return {
        key.module: key
        for key in keys
        if key.fingerprint == model.fingerprint and key.corpus.startswith(corpus)
    }


def _stored(model: EditableModel, module: str, file: Path, folder: Path) -> MomentKey | None:
    """The key under which a published file was imported last; None if it was not."""
    corpus = _corpus(file, None, is_sum=False)
    return _newest(model, folder, corpus).get(module)


def _import(
    model: EditableModel,
    module: str,
    file: Path,
    folder: Path,
    *,
    count: int | None = None,
    is_sum: bool = False,
) -> Imported:
    published = read_published(file, count=count, is_sum=is_sum)
    size = model.weight(module).shape[1]
    if tuple(published.sum_II.shape) != (size, size):
        raise ConfigError(
            message(
                str(file),
                f"the second moment does not fit {module} of {model.name}",
                got=tuple(published.sum_II.shape),
                expected=f"shape {(size, size)}",
            )
        )
    is_definite = check_moment(file, published)
    documents = DOCUMENTS.search(file.name.removesuffix(file.suffix))
    key = MomentKey(
        model=model.name,
        fingerprint=model.fingerprint,
        module=module,
        corpus=_corpus(file, count, is_sum=is_sum),
        num_documents=int(documents[1]) if documents and DESCRIPTION.search(file.name) else 0,
        context_length=0,  # unknown
        dtype=str(model.dtype).removeprefix("torch."),
        products=str(published.dtype).removeprefix("torch."),
        imported=file.name,
    )
    write(folder, key, MomentSum(published.sum_II, published.count))
    return Imported(
        path=file,
        key=key,
        count=published.count,
        is_definite=is_definite,
        length=float(published.sum_II.trace()) / published.count / own_square(model, module),
    )


def own_square(model: EditableModel, module: str) -> float:
    """The mean |k|^2 of the keys of a matrix in a short text."""
    text = " ".join(statements(read_table(), seed=1, num_documents=STATEMENTS))
    ids = model.tokenizer(text, truncation=True, max_length=model.max_length)["input_ids"]
    with torch.no_grad(), capture(model, inputs=[module]) as captured:
        model.final_hidden(pad([ids], device=model.device))
    return float(captured.inputs[module].double().square().sum(-1).mean())


def check_moment(file: Path, published: Published) -> bool:
    """Checks that a matrix can be a sum of k k^T up to the rounding of the file's dtype, and makes
    it exactly symmetric in place. Returns whether it is positive definite.

    Raises:
        ConfigError: the matrix is not finite, not symmetric, or has a negative eigenvalue.
    """
    sum_II, rounding = published.sum_II, float(torch.finfo(published.dtype).eps)
    if not bool(torch.isfinite(sum_II).all()):
        raise ConfigError(message(str(file), "the second moment is not finite"))
    largest, trace = float(sum_II.abs().max()), float(sum_II.trace())
    difference = 0.0
    for start in range(0, len(sum_II), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        difference = max(difference, float((sum_II[rows] - sum_II[:, rows].T).abs().max()))
    if largest == 0.0 or difference > ASYMMETRY * rounding * largest:
        problem = "the second moment is zero" if largest == 0.0 else "the matrix is not symmetric"
        got = f"entries up to {largest:.3g}, mirror images that differ by {difference:.3g}"
        raise ConfigError(message(str(file), problem, got=got))
    sum_II += sum_II.T.clone()
    sum_II /= 2
    if published.count >= len(sum_II) and int(torch.linalg.cholesky_ex(sum_II)[1]) == 0:
        return True
    shift_II = sum_II.clone()
    shift_II.diagonal().add_(ROUNDING * rounding * trace)
    if trace <= 0 or int(torch.linalg.cholesky_ex(shift_II)[1]) != 0:
        problem = "the matrix has a negative eigenvalue, and so it is no second moment"
        raise ConfigError(message(str(file), problem))
    return False
