"""What is wrong with a model's folder, told before transformers reads it: its errors speak of
Python's types, and without a tokenizer's files it makes an empty tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from editkit.errors import message
from editkit.files import not_an_object
from editkit.model.beside import SIDE_TENSORS
from editkit.model.source import KEY, Source

CONFIGS = (
    *("config.json", "generation_config.json"),
    *("tokenizer_config.json", "special_tokens_map.json"),
)
VOCABULARIES = ("tokenizer.json", "tekken.json", "vocab.*", "*.model")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")
# How pickled weights become safetensors, as one line for a shell.
CONVERT = (
    'python -c "import transformers as t; a, b = {folder!r}, {folder!r} + {suffix!r}; '
    "t.AutoModelForCausalLM.from_pretrained(a).save_pretrained(b); "
    't.AutoTokenizer.from_pretrained(a).save_pretrained(b)"'
)
SUFFIX = "-safetensors"
ALLOW = "set model.allow_pickle=true, with which torch reads tensors from them and nothing else"


def config_problems(folder: Path) -> list[str]:
    """The small files of a folder with a config.json that cannot be read; and a model that is more
    than its weights.
    """
    if (folder / SIDE_TENSORS).exists():
        fix = "load it with editkit.load_edited, or measure the run that made it"
        what = "something stands beside the weights, which a run would not see"
        return [message(f"{KEY}: {folder}", what, got=SIDE_TENSORS, fix=fix)]
    problems = [
        message(f"{KEY}: {folder / name}", problem, expected="a JSON object")
        for name in CONFIGS
        if (folder / name).exists() and (problem := not_an_object(folder / name))
    ]
    if not problems and not isinstance(_read(folder / "config.json").get("model_type"), str):
        problem, expected = "it names no architecture", "a text under model_type"
        problems.append(message(f"{KEY}: {folder / 'config.json'}", problem, expected=expected))
    return problems


def without_tokenizer(source: Source) -> list[str]:
    """The message for a folder without a tokenizer's files."""
    folder = Path(source.place)
    if source.file or not folder.is_dir() or any(any(folder.glob(name)) for name in VOCABULARIES):
        return []
    return [
        message(
            KEY,
            "the folder has no tokenizer",
            got=str(folder),
            expected="tokenizer.json beside config.json",
            fix="save the tokenizer there too, or set model.tokenizer=<folder or hub id>",
        )
    ]


def pickle_problem(source: Source, model_id: str) -> str | None:
    """What an error in loading pickled weights means; None for other weights."""
    if not source.is_folder or source.file or not _has_pickled_weights(Path(source.place)):
        return None
    problem = "the pickled weights hold something else than tensors, or are damaged"
    return message(KEY, f"{problem}; nothing of them was run", got=model_id)


def tokenizer_problem(source: Source, key: str) -> str | None:
    """What is wrong with a tokenizer.json that could not be read; None if that is not known.

    Args:
        key: the option that chose the source.
    """
    path, expected = Path(source.place) / "tokenizer.json", "a file that `save_pretrained` wrote"
    if source.file or not path.is_file():
        return None
    problem = not_an_object(path)
    if problem is None and not isinstance(_read(path).get("model"), dict):
        problem = "it describes no tokenizer"
    return problem and message(f"{key}: {path}", problem, expected=expected)


def _has_pickled_weights(folder: Path) -> bool:
    return not any(folder.glob("*.safetensors")) and any(any(folder.glob(name)) for name in PICKLED)


def without_weights(folder: Path, *, allow_pickle: bool) -> list[str]:
    """The message for a folder without weights that may be loaded."""
    if any(folder.glob("*.safetensors")):
        return []
    expected = "model.safetensors, or its shards"
    if not _has_pickled_weights(folder):
        return [message(KEY, "the folder has no weights", got=str(folder), expected=expected)]
    if allow_pickle:
        return []
    convert = CONVERT.format(folder=str(folder.absolute()), suffix=SUFFIX)
    return [
        message(
            KEY,
            "the weights are Python pickles, which can hold a program",
            got=str(folder),
            expected=expected,
            fix=f"convert them with `{convert}`, or {ALLOW}",
        )
    ]


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
