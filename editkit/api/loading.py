"""`editkit.load`: from a transformers model, a name, a folder or a hub id to an EditableModel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from editkit.config.compose import conf_folder
from editkit.config.schema import Problems, construct
from editkit.errors import ConfigError, message
from editkit.model.architecture import label_of
from editkit.model.chat import chat_template as template_of
from editkit.model.editable import EditableModel
from editkit.model.families import Family
from editkit.model.load import ModelConfig, require_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load(
    model: PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerFast | str | Path | None = None,
    *,
    name: str | None = None,
    family: Family | str | None = None,
    expert: int | None = None,
    device: str | None = None,
    chat_template: str | None = None,
    allow_pickle: bool = False,
) -> EditableModel:
    """A model that can be edited.

    A transformers model is wrapped without a copy: it is put into evaluation mode, its parameters
    need no gradients any more, and edits are written into it.

    Args:
        model: a causal language model of transformers; or a name of `conf/model` ("gpt2-xl"), a
            folder, a GGUF file, or a hub id.
        tokenizer: a fast tokenizer. A model that is given by its name brings its own.
        name: used in messages and records, and to find a recipe. Default: the name of the known
            model with the same hub id, else the last part of the id or folder.
        family: for an unknown architecture, the name of a known one with the same module names, or
            the module names themselves.
        expert: of a mixture of experts, the one whose matrices are edited.
        device: where the model is moved to. Default: a model of transformers stays where it is, a
            model that is loaded by its name is on the CPU.
        chat_template: how prompts are put to the model: as they are (None), by the chat template of
            the tokenizer ("tokenizer"), or by that of a file.
        allow_pickle: whether pickled weights (pytorch_model.bin) are loaded, of which only tensors
            are read.

    Raises:
        ConfigError: the model cannot be loaded, its architecture is unknown, or its tokenizer is
            slow or missing.
    """
    if isinstance(model, str | Path):
        given: dict[str, Any] = {"name": name, "family": family, "chat_template": chat_template}
        given |= {"allow_pickle": allow_pickle, "expert": expert}
        return _by_name(os.fspath(model), tokenizer, given).load(device or "cpu")
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "model_type") or not hasattr(model, "get_submodule"):
        expected = "a causal language model of transformers, a name, a folder or a hub id"
        problem = "not a model that can be edited"
        raise ConfigError(message("model", problem, got=type(model).__name__, expected=expected))
    if tokenizer is None or isinstance(tokenizer, str | Path):
        problem = "the tokenizer of the model is needed"
        fix = "pass AutoTokenizer.from_pretrained(...) as the second argument"
        raise ConfigError(message("tokenizer", problem, got=tokenizer, fix=fix))
    source = str(getattr(config, "name_or_path", "") or config.model_type)
    if device is not None:
        require_device(device)
        model.to(device)  # type: ignore[arg-type] # transformers wraps the method without its types
    settings = ModelConfig(id=source, family=family, expert=expert)
    return EditableModel(
        model,
        tokenizer,
        name=name or _known_name(source),
        family=settings.family_of(config),
        chat=None if chat_template is None else template_of(tokenizer, chat_template),
    )


def bundled_models() -> tuple[str, ...]:
    """The names of the models that come with the package."""
    folder = Path(__file__).resolve().parent.parent / "assets"
    return tuple(sorted(path.parent.name for path in folder.glob("*/config.json")))


def _by_name(model: str, tokenizer: Any, given: dict[str, Any]) -> ModelConfig:
    """The configuration of a named model. `given` replaces its options where it is not None."""
    if tokenizer is not None and not isinstance(tokenizer, str | Path):
        problem = "a model that is loaded by its name loads its tokenizer by a name too"
        expected = "a folder, a hub id or None"
        kind = type(tokenizer).__name__
        raise ConfigError(message("tokenizer", problem, got=kind, expected=expected))
    given = given | {"tokenizer": None if tokenizer is None else os.fspath(tokenizer)}
    given = {key: value for key, value in given.items() if value is not None}
    node = _known_models().get(model, {"id": model})
    problems = Problems()
    config = construct(node | given, "model", ModelConfig, problems)
    if config is None:
        raise ConfigError(problems.messages)
    return config


def _known_models() -> dict[str, dict[str, Any]]:
    """The options of conf/model with an id, by name."""
    nodes = {
        path.stem: yaml.safe_load(path.read_text())
        for path in sorted((conf_folder() / "model").glob("*.yaml"))
    }
    return {name: node for name, node in nodes.items() if node["id"] != "???"}


def _known_name(source: str) -> str:
    """The name of the known model with this hub id, else the last part of the id."""
    ids = {str(node["id"]).lower(): name for name, node in _known_models().items()}
    return ids.get(source.lower(), label_of(None, source))
