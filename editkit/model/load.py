"""Loading of an `EditableModel` from the fields of `conf/model/*.yaml`."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.architecture import ASSET, NAMES, facts_without_download, known_facts, label_of
from editkit.model.discover import family_suggestion
from editkit.model.families import Family, family_of
from editkit.model.hub import is_unreachable, quietly
from editkit.model.network import random_network
from editkit.model.placement import placement
from editkit.model.tokens import require_offsets

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

# For random weights, by whether the family is like Llama.
BUNDLED_TOKENIZERS = {True: "asset:tiny-llama", False: "asset:tiny-gpt2"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The choice of a model: the fields of `conf/model/*.yaml`."""

    id: str  # a folder, a hub id, or "asset:<name>" for a bundled model
    name: str | None = None  # the model's name in results; None: the last part of the id
    revision: str | None = None  # of the hub repository; None: its main branch
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    # None: from the checkpoint's model_type; else a known family, or the module names themselves
    family: Family | str | None = None
    # random: seeded random weights of the real shapes, without the hub
    weights: Literal["pretrained", "random"] = "pretrained"
    # a folder or hub id; None: the model's own, or a bundled one with random weights
    tokenizer: str | None = None
    # auto: accelerate distributes the model over all GPUs; None: the whole model on runtime.device
    device_map: Literal["auto"] | None = None

    @property
    def label(self) -> str:
        """The model's name in results."""
        return label_of(self.name, self.id)

    def load(self, device: str = "cpu") -> EditableModel:
        """The loaded model. Config and tokenizer are loaded before the weights.

        Code in a checkpoint is never executed.

        Raises:
            ConfigError: a missing or unreadable model, an unknown architecture, a slow tokenizer, a
                checkpoint without some of the weights, or a missing device.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from editkit.model.editable import EditableModel

        logging.disable_progress_bar()  # a run shows its own progress

        require_device(device)
        if self.weights == "random":
            config = self.network_config()
            network = random_network(config, device=device, dtype=self.dtype)
            return EditableModel(
                network, self.load_tokenizer(), name=self.label, family=self.family_of(config)
            )
        source = self._source()
        try:
            config = self.network_config()
            family = self.family_of(config)
            tokenizer = self.load_tokenizer()
            places: Any = (
                placement(config, family, self.dtype) if self.device_map else _at_once_on(device)
            )
            # With output_loading_info it returns a pair, which its annotations do not declare.
            weights: Any = AutoModelForCausalLM
            with quietly():
                network, report = weights.from_pretrained(
                    source,
                    config=config,
                    dtype=getattr(torch, self.dtype),
                    output_loading_info=True,
                    **self._where,
                    **_hub_options(source),
                    **({"device_map": places} if places else {}),
                )
        except ConfigError:
            raise
        # A missing, gated or unreachable repository, a damaged file, or tensors of other shapes.
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise self._unloadable(source, error) from error
        if absent := sorted(report["missing_keys"]):
            raise ConfigError(
                message(
                    "model.id",
                    "the checkpoint lacks weights of its architecture: " + ", ".join(absent[:4]),
                    got=self.id,
                    fix="choose a complete checkpoint of a causal language model",
                )
            )
        if not places:
            network = network.to(device)
        return EditableModel(network, tokenizer, name=self.label, family=family)

    def facts(self) -> dict[str, Any] | None:
        """The known part of config.json, without the hub and without torch; None if only the hub
        has it.
        """
        return facts_without_download(self.label, self.id)

    @property
    def positions(self) -> int | None:
        """The context length; None if only the hub has it, or if config.json does not have it at
        its top level.
        """
        facts = self.facts() or {}
        return next(
            (int(facts[key]) for key in NAMES["num_positions"] if facts.get(key) is not None), None
        )

    def network_config(self, *, is_local: bool = False) -> Any:
        """The transformers configuration from the checkpoint.

        With random weights it comes from `architectures.json` if the model is known there.

        Args:
            is_local: use `architectures.json` for pretrained weights as well.
        """
        from transformers import AutoConfig

        facts = None if Path(self.id).expanduser().is_dir() else known_facts().get(self.label)
        if facts is not None and (is_local or self.weights == "random"):
            kind = facts.pop("model_type")
            return AutoConfig.for_model(kind, **facts)
        source = self._source()
        try:
            with quietly():
                return AutoConfig.from_pretrained(source, **self._where, **_hub_options(source))
        except (OSError, ValueError) as error:
            raise self._unloadable(source, error) from error

    def load_tokenizer(self, *, is_local: bool = False) -> Any:
        """The fast tokenizer. Raises ConfigError for a missing or slow one.

        Args:
            is_local: do not use the hub.
        """
        from transformers import AutoTokenizer

        source, where = (
            self.tokenizer or self._source(),
            {} if self.tokenizer else dict(self._where),
        )
        if self.weights == "random" and self.tokenizer is None and not _has_tokenizer(source):
            kind = (self.facts() or {}).get("model_type", "")
            asset = BUNDLED_TOKENIZERS[kind not in ("gpt2", "gptj", "gpt_neox")]
            source, where = ModelConfig(id=asset)._source(), {}
        try:
            with quietly():
                tokenizer: Any = AutoTokenizer.from_pretrained(
                    source, **where, **_hub_options(source, is_local=is_local)
                )
        except (OSError, ValueError) as error:
            raise self._unloadable(source, error) from error
        require_offsets(tokenizer)
        return tokenizer

    def family_of(self, config: Any) -> Family:
        """The family of a transformers configuration.

        Raises:
            ConfigError: an unknown architecture. The message suggests module names if possible.
        """
        if isinstance(self.family, Family):
            return self.family
        try:
            return family_of(self.family or config.model_type)
        except ConfigError as error:
            raise ConfigError([*error.problems, *family_suggestion(config)]) from None

    @property
    def _where(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": False}

    def _unloadable(self, source: str, error: Exception) -> ConfigError:
        return ConfigError(
            message(
                "model.id",
                f"the model cannot be loaded from {self._looked_in(source)}: {_first_line(error)}",
                got=self.id,
            )
        )

    def _source(self) -> str:
        """The folder or hub id for transformers. Raises ConfigError for a missing folder."""
        if self.id.startswith(ASSET):
            folder = (
                Path(str(importlib.resources.files("editkit")))
                / "assets"
                / self.id.removeprefix(ASSET)
            )
            if not (folder / "config.json").is_file():
                bundled = sorted(path.parent.name for path in folder.parent.glob("*/config.json"))
                raise ConfigError(
                    message(
                        "model.id",
                        "no bundled model has this name",
                        got=self.id,
                        expected=f"one of {', '.join(ASSET + name for name in bundled)}",
                    )
                )
            return str(folder)
        folder = Path(self.id).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ConfigError(
                    message(
                        "model.id",
                        "the folder has no config.json",
                        got=str(folder),
                        expected="a model folder as `save_pretrained` writes it",
                    )
                )
            return str(folder)
        if self.id.startswith((".", "/", "~")) or self.id.count("/") > 1:
            raise ConfigError(
                message("model.id", "the folder does not exist", got=str(folder.absolute()))
            )
        return self.id

    def _looked_in(self, source: str) -> str:
        if Path(source).is_dir():
            return source
        branch = f"revision {self.revision}" if self.revision else "main branch"
        return f"{Path(source).absolute()} (no such folder) or the hub, {branch}"


def _hub_options(source: str, *, is_local: bool = False) -> dict[str, Any]:
    """Restricts loading to the local cache if the hub must not be used or is unreachable."""
    return {"local_files_only": is_local or (not Path(source).is_dir() and is_unreachable())}


def _at_once_on(device: str) -> dict[str, torch.device] | None:
    """A `device_map` that puts each weight on the GPU when it is read, so that the host never holds
    all weights.
    """
    return {"": torch.device(device)} if device.startswith("cuda") else None


def _has_tokenizer(source: str) -> bool:
    return any(
        (Path(source) / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    )


def require_device(device: str) -> None:
    """Raises ConfigError for a device that is missing or cannot be used here."""
    devices = [
        "cpu",
        *(f"cuda:{index}" for index in range(torch.cuda.device_count())),
        *(["mps"] if torch.mps.is_available() else []),
    ]
    if (f"{device}:0" if device == "cuda" else device) not in devices:
        raise ConfigError(
            message(
                "runtime.device",
                "this machine does not have the device",
                got=device,
                expected=f"one of {', '.join(devices)}",
            )
        )
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:  # another process uses the device exclusively, or it is broken
        raise ConfigError(
            message(
                "runtime.device", f"the device cannot be used: {_first_line(error)}", got=device
            )
        ) from None


def _first_line(error: Exception) -> str:
    """The first line of an error's text, without a full stop."""
    lines = (line.strip().rstrip(".") for line in str(error).splitlines() if line.strip())
    return next(lines, type(error).__name__)
