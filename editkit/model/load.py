"""From a model's config to a loaded `EditableModel`."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.model.architecture import ASSET, NAMES, facts_without_download, known_facts, label_of
from editkit.model.discover import suggestion
from editkit.model.families import Family, family_of
from editkit.model.hub import is_out_of_reach, quietly
from editkit.model.network import random_network
from editkit.model.placement import placement
from editkit.model.tokens import require_offsets

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

BUNDLED_TOKENIZERS = {
    True: "asset:tiny-llama",
    False: "asset:tiny-gpt2",
}  # for random weights, by whether the family is like Llama


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model: the fields of `conf/model/*.yaml`."""

    id: str  # a folder, a hub id, or "asset:<name>" for a model that comes with the package
    name: str | None = None  # how results call it; None: the last part of the id
    revision: str | None = None  # of the hub repository; None: its main branch
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    # None: by the checkpoint's model_type; else the name of a known one, or the module names
    # themselves
    family: Family | str | None = None
    # random: the real shape, seeded, without the hub
    weights: Literal["pretrained", "random"] = "pretrained"
    # a folder or hub id; None: the model's own, with random weights a bundled one
    tokenizer: str | None = None
    # auto: over all GPUs, by accelerate; None: the whole model on runtime.device
    device_map: Literal["auto"] | None = None

    @property
    def label(self) -> str:
        """The name that results carry."""
        return label_of(self.name, self.id)

    def load(self, device: str = "cpu") -> EditableModel:
        """Loads config and tokenizer first, then the weights.

        Raises ConfigError for a model that is not there or cannot be read, an unknown architecture,
        a slow tokenizer, a checkpoint without some of the weights, and a device that is not there.
        Code that comes with a checkpoint is never run.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from editkit.model.editable import EditableModel

        logging.disable_progress_bar()  # runs show their own

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
            # with output_loading_info it gives a pair, which its types do not say
            weights: Any = AutoModelForCausalLM
            with quietly():
                network, report = weights.from_pretrained(
                    source,
                    config=config,
                    dtype=getattr(torch, self.dtype),
                    output_loading_info=True,
                    **self._where,
                    **_asked(source),
                    **({"device_map": places} if places else {}),
                )
        except ConfigError:
            raise
        except (
            OSError,
            ValueError,
            RuntimeError,
            SafetensorError,
        ) as error:  # missing, gated, unreachable; damaged, of other shapes
            raise self._unloadable(source, error) from error
        if absent := sorted(report["missing_keys"]):
            raise ConfigError(
                f"model.id: the checkpoint {self.id!r} lacks weights that its architecture has: "
                f"{', '.join(absent[:4])}."
            )
        if not places:
            network = network.to(device)
        return EditableModel(network, tokenizer, name=self.label, family=family)

    def facts(self) -> dict[str, Any] | None:
        """The config.json, as far as it is known without the hub and without torch; None where only
        the hub knows.
        """
        return facts_without_download(self.label, self.id)

    @property
    def positions(self) -> int | None:
        """How many the network was made for; None where only the hub knows, or the config.json does
        not say it at its root.
        """
        facts = self.facts() or {}
        return next(
            (int(facts[key]) for key in NAMES["num_positions"] if facts.get(key) is not None), None
        )

    def network_config(self, *, is_local: bool = False) -> Any:
        """The transformers configuration: from the checkpoint; of random weights without the hub,
        where the sizes are known here.

        Args:
            is_local: prefer what is known here, as for random weights.
        """
        from transformers import AutoConfig

        facts = None if Path(self.id).expanduser().is_dir() else known_facts().get(self.label)
        if facts is not None and (is_local or self.weights == "random"):
            kind = facts.pop("model_type")
            return AutoConfig.for_model(kind, **facts)
        source = self._source()
        try:
            with quietly():
                return AutoConfig.from_pretrained(source, **self._where, **_asked(source))
        except (OSError, ValueError) as error:
            raise self._unloadable(source, error) from error

    def load_tokenizer(self, *, is_local: bool = False) -> Any:
        """The tokenizer, a fast one. Raises ConfigError for one that is not there, or slow.

        Args:
            is_local: look on this machine alone.
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
                    source, **where, **_asked(source, is_local=is_local)
                )
        except (OSError, ValueError) as error:
            raise self._unloadable(source, error) from error
        require_offsets(tokenizer)
        return tokenizer

    def family_of(self, config: Any) -> Family:
        """The family of a transformers configuration. Raises ConfigError for an unknown one, with
        the names to give where they show.
        """
        if isinstance(self.family, Family):
            return self.family
        try:
            return family_of(self.family or config.model_type)
        except ConfigError as error:
            raise ConfigError([*error.problems, *suggestion(config)]) from None

    @property
    def _where(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": False}

    def _unloadable(self, source: str, error: Exception) -> ConfigError:
        return ConfigError(
            f"model.id: {self.id!r} cannot be loaded - looked in {self._looked_in(source)} - "
            f"{_first_line(error)}"
        )

    def _source(self) -> str:
        """What transformers is asked for. Raises ConfigError for a folder that is not there."""
        if self.id.startswith(ASSET):
            folder = (
                Path(str(importlib.resources.files("editkit")))
                / "assets"
                / self.id.removeprefix(ASSET)
            )
            if not (folder / "config.json").is_file():
                there = sorted(path.parent.name for path in folder.parent.glob("*/config.json"))
                raise ConfigError(
                    f"model.id: no bundled model {self.id!r} - bundled are: "
                    f"{', '.join(ASSET + name for name in there) or 'none'}."
                )
            return str(folder)
        folder = Path(self.id).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ConfigError(
                    f"model.id: the folder {folder} holds no config.json - a model folder as "
                    "`save_pretrained` writes it is needed."
                )
            return str(folder)
        if self.id.startswith((".", "/", "~")) or self.id.count("/") > 1:
            raise ConfigError(f"model.id: there is no folder {folder.absolute()}.")
        return self.id

    def _looked_in(self, source: str) -> str:
        if Path(source).is_dir():
            return source
        return f"{Path(source).absolute()} (no such folder) and on the hub, {'revision ' + self.revision if self.revision else 'main branch'}"


def _asked(source: str, *, is_local: bool = False) -> dict[str, Any]:
    """Whether the hub is asked for it, and not only what was downloaded before."""
    return {"local_files_only": is_local or (not Path(source).is_dir() and is_out_of_reach())}


def _at_once_on(device: str) -> dict[str, torch.device] | None:
    """A `device_map` that puts each weight on a GPU as it is read, so that the host never holds all
    of them.
    """
    return {"": torch.device(device)} if device.startswith("cuda") else None


def _has_tokenizer(source: str) -> bool:
    return any(
        (Path(source) / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    )


def require_device(device: str) -> None:
    """Raises ConfigError, with the devices that are there, for one that is not or cannot be
    used.
    """
    there = [
        "cpu",
        *(f"cuda:{index}" for index in range(torch.cuda.device_count())),
        *(["mps"] if torch.mps.is_available() else []),
    ]
    if (f"{device}:0" if device == "cuda" else device) not in there:
        raise ConfigError(
            f"runtime.device: {device} was given; this machine has: {', '.join(there)}."
        )
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:  # in use by somebody who does not share it, or broken
        raise ConfigError(
            f"runtime.device: {device!r} cannot be used here - {_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )
