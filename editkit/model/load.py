"""Loading of an `EditableModel` from the fields of `conf/model/*.yaml`."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.architecture import NAMES, facts_without_download, known_facts, label_of
from editkit.model.chat import ChatTemplate, chat_template, file_problem
from editkit.model.complete import require_complete, require_tokens_of
from editkit.model.discover import family_suggestion
from editkit.model.families import Family, family_of, known_families, known_mixtures
from editkit.model.files import files_digest
from editkit.model.folder import (
    ALLOW,
    config_problems,
    pickle_problem,
    tokenizer_problem,
    without_tokenizer,
    without_weights,
)
from editkit.model.gguf import file_problems
from editkit.model.hub import is_unreachable, quietly, without_reports
from editkit.model.kinds import auto_class, family_of_config, family_of_expert, require_decoder
from editkit.model.network import random_network
from editkit.model.placement import placement
from editkit.model.source import KEY, TOKENIZER, Source, find_source, find_tokenizer
from editkit.model.tokens import require_offsets

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

# For random weights, by whether the family is like Llama.
BUNDLED_TOKENIZERS = {True: "asset:tiny-llama", False: "asset:tiny-gpt2"}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The choice of a model: the fields of `conf/model/*.yaml`."""

    # a folder, a GGUF file, a hub id, "asset:<name>" for a bundled model, or
    # "package:<module>/<file or folder>" for one in an installed package
    id: str
    name: str | None = None  # the model's name in results; None: the last part of the id
    revision: str | None = None  # of the hub repository; None: its main branch
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    # None: from the checkpoint's model_type; else a known family, or the module names themselves
    family: Family | str | None = None
    # of a mixture of experts, the one that is edited; None: the one that all tokens share
    expert: int | None = None
    # random: seeded random weights of the real shapes, without the hub
    weights: Literal["pretrained", "random"] = "pretrained"
    # whether pickled weights (pytorch_model.bin) are loaded, of which only tensors are read
    allow_pickle: bool = False
    # a folder or hub id; None: the model's own, or a bundled one with random weights
    tokenizer: str | None = None
    # how prompts are put to the model: as they are (None), by the tokenizer's chat template
    # ("tokenizer"), or by that of a Jinja file
    chat_template: str | None = None
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
            ConfigError: a missing or unreadable model, an unknown architecture, a slow tokenizer,
                one with more tokens than the network, a checkpoint without some of the weights or
                with others than config.json tells, or a missing device.
        """
        from transformers.utils import logging

        from editkit.model.editable import EditableModel

        logging.disable_progress_bar()  # a run shows its own progress

        require_device(device)
        if self.weights == "random":
            config = self.network_config()
            tokenizer = self.load_tokenizer()
            chat = self.chat_of(tokenizer)
            network = random_network(config, device=device, dtype=self.dtype)
            family = self.family_of(config)
            return EditableModel(network, tokenizer, name=self.label, family=family, chat=chat)
        source = self._source()
        if missing := self._missing(source):
            raise ConfigError(missing)
        config = self.network_config()
        family = self.family_of(config)
        tokenizer = self.load_tokenizer()
        require_tokens_of(config, tokenizer, key=TOKENIZER if self.tokenizer else KEY)
        chat = self.chat_of(tokenizer)
        places: Any = (
            placement(config, family, self.dtype) if self.device_map else _at_once_on(device)
        )
        with (
            self._explained(source, lambda: pickle_problem(source, self.id)),
            quietly(),
            without_reports(),
            _without_gguf_progress(),
        ):
            network, report = auto_class(config).from_pretrained(
                source.place,
                config=config,
                dtype=getattr(torch, self.dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below
                weights_only=True,
                **({} if self.allow_pickle or source.file else {"use_safetensors": True}),
                **self._where,
                **_source_options(source),
                **_dequantised(source),
                **({"device_map": places} if places else {}),
            )
        require_complete(report, key=KEY, model_id=self.id)
        if not places:
            network = network.to(device)
        return EditableModel(network, tokenizer, name=self.label, family=family, chat=chat)

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

    def files_digest(self) -> str | None:
        """A digest of the files that the model is loaded from, without reading all of large ones;
        None for a model of the hub.

        Raises:
            ConfigError: the files are missing.
        """
        sources = [self._source(), *([find_tokenizer(self.tokenizer)] if self.tokenizer else [])]
        template = Path(self.chat_template or "").expanduser()
        return files_digest(sources, [template] if template.is_file() else [])

    def network_config(self, *, is_local: bool = False) -> Any:
        """The transformers configuration from the checkpoint.

        With random weights it comes from `architectures.json` if the model is known there.

        Args:
            is_local: use `architectures.json` for pretrained weights as well.
        """
        from transformers import AutoConfig

        facts = None if Path(self.id).expanduser().exists() else known_facts().get(self.label)
        if facts is not None and (is_local or self.weights == "random"):
            kind = facts.pop("model_type")
            return AutoConfig.for_model(kind, **facts)
        source = self._source()
        with self._explained(source), quietly():
            return AutoConfig.from_pretrained(
                source.place, **self._where, **_source_options(source)
            )

    def load_tokenizer(self, *, is_local: bool = False) -> Any:
        """The fast tokenizer. Raises ConfigError for a missing or slow one.

        Args:
            is_local: do not use the hub.
        """
        from transformers import AutoTokenizer

        source, where = (
            find_tokenizer(self.tokenizer) if self.tokenizer else self._source(),
            {} if self.tokenizer else dict(self._where),
        )
        if self.weights == "random" and self.tokenizer is None and not _has_tokenizer(source):
            kind = (self.facts() or {}).get("model_type", "")
            asset = BUNDLED_TOKENIZERS[kind not in ("gpt2", "gptj", "gpt_neox")]
            source, where = ModelConfig(id=asset)._source(), {}
        if not self.tokenizer and (missing := without_tokenizer(source)):
            raise ConfigError(missing)
        key = TOKENIZER if self.tokenizer else KEY
        with self._explained(source, lambda: tokenizer_problem(source, key), key=key), quietly():
            tokenizer: Any = AutoTokenizer.from_pretrained(
                source.place, **where, **_source_options(source, is_local=is_local)
            )
        require_offsets(tokenizer)
        return tokenizer

    def family_of(self, config: Any) -> Family:
        """The family of a transformers configuration.

        Raises:
            ConfigError: an unknown architecture. The message suggests module names if possible.
        """
        if self.expert is not None:
            return family_of_expert(config, self.expert, self.family)
        if isinstance(self.family, Family):
            return self.family
        if self.family is None:
            require_decoder(config)
        try:
            return family_of(self.family) if self.family else family_of_config(config)
        except ConfigError as error:
            raise ConfigError([*error.problems, *family_suggestion(config)]) from None

    @property
    def _where(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": False}

    @contextlib.contextmanager
    def _explained(
        self, source: Source, known: Callable[[], str | None] = lambda: None, *, key: str = KEY
    ) -> Iterator[None]:
        """Raises every error of transformers as a ConfigError: a missing, gated or unreachable
        repository, or a damaged file, for which its libraries have errors of any kind.

        Args:
            known: the message after an error, if the files show a reason.
            key: the option that chose the source.
        """
        try:
            yield
        except Exception as error:
            if problem := known():
                raise ConfigError(problem) from error
            what, got = ("tokenizer", self.tokenizer) if key == TOKENIZER else ("model", self.id)
            reason, fix = _first_line(error), None
            if "use_safetensors" in reason:  # of the hub's files
                reason, fix = "its weights are Python pickles", ALLOW
            problem = f"the {what} cannot be loaded from {self._looked_in(source)}: {reason}"
            raise ConfigError(message(key, problem, got=got, fix=fix)) from error

    def source_problems(self) -> list[str]:
        """Why the model's files cannot be loaded, as far as this machine shows it without reading
        weights: a missing folder, package or file, pickled weights, and a GGUF file or config.json
        that cannot be read.
        """
        problems = [problem for problem in (file_problem(self.chat_template),) if problem]
        if isinstance(self.family, str) and self.family not in self._families():
            expected = f"one of {', '.join(sorted(self._families()))}, or module names"
            problem = "the architecture is not known"
            problems.append(message("model.family", problem, got=self.family, expected=expected))
        try:
            problems += self._missing(self._source())
            if self.tokenizer:
                find_tokenizer(self.tokenizer)
        except ConfigError as error:
            problems += error.problems
        return problems

    def _families(self) -> dict[str, Family]:
        return known_families() if self.expert is None else known_mixtures()

    def _missing(self, source: Source) -> list[str]:
        """The messages for what a folder lacks."""
        if not source.is_folder or source.file or self.weights == "random":
            return []
        problems = [] if self.tokenizer else without_tokenizer(source)
        folder = Path(source.place)
        return problems + without_weights(folder, allow_pickle=self.allow_pickle)

    def chat_of(self, tokenizer: Any) -> ChatTemplate | None:
        """The chat template that is chosen; None if prompts are put to the model as they are."""
        if self.chat_template is None:
            return None
        return chat_template(tokenizer, self.chat_template)

    def _source(self) -> Source:
        """The folder, file or hub id for transformers. Raises ConfigError for what is missing, and
        for a GGUF file that cannot be read.
        """
        source = find_source(self.id)
        if source.gguf is not None and (
            problems := file_problems(
                source.gguf,
                any_family=self.family is not None,
                needs_tokenizer=self.tokenizer is None,
            )
        ):
            raise ConfigError(problems)
        is_plain = source.is_folder and source.file is None
        if is_plain and (problems := config_problems(Path(source.place))):
            raise ConfigError(problems)
        return source

    def _looked_in(self, source: Source) -> str:
        if source.is_folder:
            return str(source.gguf or source.place)
        branch = f"revision {self.revision}" if self.revision else "main branch"
        return f"{Path(source.place).absolute()} (no such folder) or the hub, {branch}"


def _source_options(source: Source, *, is_local: bool = False) -> dict[str, Any]:
    """The file in a folder of GGUF files. Restricts loading to the local cache if the hub must not
    be used or is unreachable.
    """
    from_cache = is_local or (not source.is_folder and is_unreachable())
    return {"local_files_only": from_cache} | ({"gguf_file": source.file} if source.file else {})


def _dequantised(source: Source) -> dict[str, Any]:
    """The option that makes a plain network of a GGUF file, also where the machine could multiply
    with its quantised matrices: those cannot be edited or saved.
    """
    if source.file is None:
        return {}
    from transformers.utils.quantization_config import GgufConfig

    return {"quantization_config": GgufConfig(dequantize=True)}


@contextlib.contextmanager
def _without_gguf_progress() -> Iterator[None]:
    """Hides the bar of transformers' reader of GGUF files, which has no option for it."""
    reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = reader.tqdm
    reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


def _at_once_on(device: str) -> dict[str, torch.device] | None:
    """A `device_map` that puts each weight on the GPU when it is read, so that the host never holds
    all weights.
    """
    return {"": torch.device(device)} if device.startswith("cuda") else None


def _has_tokenizer(source: Source) -> bool:
    return source.file is not None or any(
        (Path(source.place) / name).is_file()
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
    """The first line of an error's text, without a full stop; with the next one if it announces
    it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".")
