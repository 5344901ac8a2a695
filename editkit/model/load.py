"""From a model's config to a loaded `EditableModel`."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.model.families import Family, family_of
from editkit.model.tokens import require_offsets

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

ASSET = "asset:"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model: the fields of `conf/model/*.yaml`."""

    id: str  # a folder, a hub id, or "asset:<name>" for a model that comes with the package
    name: str | None = None  # how results call it; None: the last part of the id
    revision: str | None = None  # of the hub repository; None: its main branch
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    family: Family | str | None = None  # None: by the checkpoint's model_type; else the name of a known one, or the module names themselves

    @property
    def label(self) -> str:
        """The name that results carry."""
        return self.name or self.id.removeprefix(ASSET).rstrip("/").rsplit("/", 1)[-1]

    def load(self, device: str = "cpu") -> EditableModel:
        """Loads config and tokenizer first, then the weights.

        Raises ConfigError for a model that is not there or cannot be read, an unknown architecture, a slow tokenizer, a checkpoint without
        some of the weights, and a device that is not there. Code that comes with a checkpoint is never run.
        """
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        from editkit.model.editable import EditableModel

        logging.disable_progress_bar()  # runs show their own

        _require_device(device)
        source = self._source()
        where: dict[str, Any] = {"revision": self.revision, "trust_remote_code": False}
        try:
            config = AutoConfig.from_pretrained(source, **where)
            family = self._family(config.model_type)
            tokenizer: Any = AutoTokenizer.from_pretrained(source, **where)
            require_offsets(tokenizer)
            weights: Any = AutoModelForCausalLM  # with output_loading_info it gives a pair, which its types do not say
            network, report = weights.from_pretrained(
                source, config=config, dtype=getattr(torch, self.dtype), output_loading_info=True, **where
            )
        except ConfigError:
            raise
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # missing, gated, unreachable; damaged, of other shapes
            raise ConfigError(
                f"model.id: {self.id!r} cannot be loaded - looked in {self._looked_in(source)} - {_first_line(error)}"
            ) from error
        if absent := sorted(report["missing_keys"]):
            raise ConfigError(f"model.id: the checkpoint {self.id!r} lacks weights that its architecture has: {', '.join(absent[:4])}.")
        return EditableModel(network.to(device), tokenizer, name=self.label, family=family)

    def _source(self) -> str:
        """What transformers is asked for. Raises ConfigError for a folder that is not there."""
        if self.id.startswith(ASSET):
            folder = Path(str(importlib.resources.files("editkit"))) / "assets" / self.id.removeprefix(ASSET)
            if not (folder / "config.json").is_file():
                there = sorted(path.parent.name for path in folder.parent.glob("*/config.json"))
                raise ConfigError(
                    f"model.id: no bundled model {self.id!r} - bundled are: {', '.join(ASSET + name for name in there) or 'none'}."
                )
            return str(folder)
        folder = Path(self.id).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ConfigError(
                    f"model.id: the folder {folder} holds no config.json - a model folder as `save_pretrained` writes it is needed."
                )
            return str(folder)
        if self.id.startswith((".", "/", "~")) or self.id.count("/") > 1:
            raise ConfigError(f"model.id: there is no folder {folder.absolute()}.")
        return self.id

    def _looked_in(self, source: str) -> str:
        if Path(source).is_dir():
            return source
        return (
            f"{Path(source).absolute()} (no such folder) and on the hub, {'revision ' + self.revision if self.revision else 'main branch'}"
        )

    def _family(self, model_type: str) -> Family:
        return self.family if isinstance(self.family, Family) else family_of(self.family or model_type)


def _require_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ConfigError(f"runtime.device: {device!r} cannot be used here - {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
