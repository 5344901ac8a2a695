"""The weights in which a model that somebody else edited differs from its base.

The base's network runs with the other weights, so both must agree in everything else: the
configuration, the shapes and the tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from editkit.errors import ConfigError, message
from editkit.lazy import torch
from editkit.model.fingerprint import NOT_CONTENT
from editkit.model.load import ModelConfig
from editkit.model.source import KEY, find_source

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

# Keys of config.json that do not change what the network computes.
UNUSED = NOT_CONTENT | {
    *("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"),
    *("task_specific_params", "max_length", "gradient_checkpointing", "chunk_size_feed_forward"),
    *("problem_type", "id2label", "label2id", "output_attentions", "output_hidden_states"),
    *("return_dict", "is_encoder_decoder", "is_decoder", "quantization_config"),
}
# Words, blanks, digits, signs and several scripts: tokenizers that agree on them agree on prompts.
PROBE = "The capital of France is Paris.\n  It's 12,345 km\t(naïve), 日本語, Привет, 🙂 x_y=z"
MOST_NAMED = 4  # values that a message lists
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, kw_only=True, eq=False)
class OtherWeights:
    """What a model that somebody else edited has in place of its base's weights."""

    fingerprint: str
    # (O, I) on the CPU, by the name of a matrix's module, or of another parameter
    by_name: Mapping[str, torch.Tensor]


def source_problems(model_id: str, key: str) -> list[str]:
    """Why the files of a model cannot be loaded, as far as that is known without reading weights.

    Args:
        key: the key that messages name.
    """
    return _under(key, ModelConfig(id=model_id).source_problems())


def files_of(model_id: str) -> str | None:
    """A digest of a model's files, as `ModelConfig.files_digest`."""
    return ModelConfig(id=model_id).files_digest()


def other_weights(base: EditableModel, model_id: str, key: str) -> OtherWeights:
    """The weights of a model where they differ from those of `base`, which has no edits.

    Raises:
        ConfigError: the model cannot be loaded, is no edited version of the base, or equals it.
    """
    dtype = cast(Any, str(base.dtype).removeprefix("torch."))
    try:
        # A folder without a tokenizer is measured with that of the base.
        own_tokenizer = _may_have_tokenizer(model_id)
        tokenizer = None if own_tokenizer else str(base.tokenizer.name_or_path)
        config = ModelConfig(id=model_id, dtype=dtype, family=base.family, tokenizer=tokenizer)
        _require_same_network(base, config.network_config(), key)
        other = config.load("cpu")
    except ConfigError as error:
        raise ConfigError(_under(key, error.problems)) from None
    if problems := [*_shapes(base, other, key), *_tokens(base, other, key)]:
        raise ConfigError(problems)
    by_name = dict(_differing(base, other))
    if not by_name:
        problem = f"all weights are those of {base.name}, so there is nothing that was edited"
        raise ConfigError(message(key, problem, got=model_id))
    return OtherWeights(fingerprint=other.fingerprint, by_name=by_name)


def _differing(base: EditableModel, other: EditableModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every matrix and every other parameter that differs, once each, in the network's order."""
    others = dict(other.network.named_parameters())
    for parameter, value in base.network.named_parameters():
        if not torch.equal(value.detach().cpu(), others[parameter].detach()):
            owner = parameter.removesuffix(".weight")
            name = parameter if owner == parameter or not _is_matrix(base, owner) else owner
            yield name, other.weight(name)


def _is_matrix(model: EditableModel, module: str) -> bool:
    try:
        model.weight(module)
    except ConfigError:
        return False
    return True


def _require_same_network(base: EditableModel, config: Any, key: str) -> None:
    """Raises ConfigError for another architecture, or one of another size."""
    ours, theirs = base.network.config.to_dict(), config.to_dict()
    differing = [
        name
        for name in sorted((ours.keys() | theirs.keys()) - UNUSED)
        if not name.startswith("_") and ours.get(name) != theirs.get(name)
    ]
    if differing:
        kind = "model_type"
        shown = [kind] if kind in differing else differing[:MOST_NAMED]
        raise ConfigError(
            message(
                key,
                f"the model is no edited version of {base.name}: its config.json is another",
                got=", ".join(f"{name}={theirs.get(name)}" for name in shown),
                expected=", ".join(f"{name}={ours.get(name)}" for name in shown),
            )
        )


def _shapes(base: EditableModel, other: EditableModel, key: str) -> Iterator[str]:
    ours, theirs = (
        {name: tuple(value.shape) for name, value in model.network.named_parameters()}
        for model in (base, other)
    )
    if differing := [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]:
        name = differing[0]
        problem = f"the model is no edited version of {base.name}: {name} differs in its shape"
        got, expected = theirs.get(name), f"{ours.get(name)}"
        yield message(key, problem, got=got, expected=expected)


def _tokens(base: EditableModel, other: EditableModel, key: str) -> Iterator[str]:
    ours, theirs = base.tokenizer, other.tokenizer
    probed = [tokenizer(PROBE)["input_ids"] for tokenizer in (ours, theirs)]
    if probed[0] == probed[1] and ours.get_vocab() == theirs.get_vocab():
        return
    sizes = [len(tokenizer.get_vocab()) for tokenizer in (theirs, ours)]
    yield message(
        key,
        f"the tokenizer is another than that of {base.name}",
        got=f"{sizes[0]} tokens, {len(probed[1])} in a short text",
        expected=f"{sizes[1]} tokens, {len(probed[0])} in that text",
        fix="give the edited model's folder the tokenizer files of the base, or none",
    )


def _may_have_tokenizer(model_id: str) -> bool:
    """Whether a model may bring a tokenizer: only of a folder it is known that it does not."""
    source = find_source(model_id)
    return (
        not source.is_folder
        or source.file is not None
        or any((Path(source.place) / name).is_file() for name in TOKENIZER_FILES)
    )


def _under(key: str, problems: Iterator[str] | list[str] | tuple[str, ...]) -> list[str]:
    """The problems with the key in place of that of the run's model."""
    return [
        f"{key}:{problem.removeprefix(f'{KEY}:')}" if problem.startswith(f"{KEY}:") else problem
        for problem in problems
    ]
