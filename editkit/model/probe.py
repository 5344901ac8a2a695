"""Inspection of a model without its weights: modules, shapes, orientation, tokenizer behaviour.

The network is built on the meta device, where tensors have shapes but no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.model.architecture import context_length
from editkit.model.families import Family, check_family, not_a_matrix
from editkit.model.network import empty_network
from editkit.model.tokens import encode, encode_with_target, fill, subject_position

if TYPE_CHECKING:
    from editkit.model.load import ModelConfig

# Prompt, subject and target. The subject has an accent and an apostrophe.
SAMPLE = ("The mother tongue of {} is", "Léon Blum's", "Paris")


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A down projection."""

    name: str
    type: str  # Linear or Conv1D
    is_transposed: bool  # whether it is stored as (I, O)
    shape: tuple[int, int]  # (O, I)


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """The properties of a model."""

    kind: str
    family: Family
    matrices: tuple[Matrix, ...]  # by layer
    num_parameters: int
    is_tied: bool
    num_positions: int
    attention: str
    # pairs (property, observation); empty if this machine does not have the tokenizer
    tokenizer: tuple[tuple[str, str], ...]
    no_tokenizer: str | None  # the reason for a missing tokenizer


def probe(config: ModelConfig) -> Probed:
    """The properties of a model, from its network without weights.

    Raises:
        ConfigError: an unknown architecture. The message suggests module names if possible.
    """
    from transformers.pytorch_utils import Conv1D

    network_config = config.network_config(is_local=True)
    family = config.family_of(network_config)
    network = empty_network(network_config)
    num_layers = check_family(family, network)
    matrices = []
    for layer in range(num_layers):
        name = family.down_projection(layer)
        module = network.get_submodule(name)
        if not isinstance(module, Conv1D | torch.nn.Linear):
            raise ConfigError(not_a_matrix(name, module))
        rows, columns = module.weight.shape
        is_transposed = isinstance(module, Conv1D)
        shape = (columns, rows) if is_transposed else (rows, columns)
        matrices.append(
            Matrix(name=name, type=type(module).__name__, is_transposed=is_transposed, shape=shape)
        )
    head: Any = network.get_output_embeddings()
    tokenizer, reason = local_tokenizer(config)
    return Probed(
        kind=network_config.model_type,
        family=family,
        matrices=tuple(matrices),
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        is_tied=head.weight is network.get_input_embeddings().weight,
        num_positions=context_length(network_config.get_text_config()),
        attention=str(getattr(network.config, "_attn_implementation", "?")),
        tokenizer=() if tokenizer is None else behaviour(tokenizer),
        no_tokenizer=reason,
    )


def behaviour(tokenizer: Any) -> tuple[tuple[str, str], ...]:
    """The properties of a tokenizer that affect editing, observed on a sample, as (name, text)."""
    prompt, subject, target = SAMPLE
    place = fill(prompt, subject)
    encoded = encode(tokenizer, [place.text])[0]
    special = tokenizer.convert_ids_to_tokens(list(encoded.ids[: encoded.num_special]))
    position = subject_position(encoded, place)
    shown = tokenizer.convert_ids_to_tokens(list(encoded.ids))
    sequence = encode_with_target(tokenizer, place.text, target)
    first, after = sequence.encoded.spans[sequence.start]
    if first > len(place.text):
        blank = "not part of the target's tokens, which begin after it"
    else:
        blank = (
            "a token of its own"
            if after == len(place.text) + 1
            else "part of the target's first token"
        )
    pad = tokenizer.pad_token
    return (
        ("class", f"{type(tokenizer).__name__}, {len(tokenizer)} tokens"),
        ("BOS", f"{special[0]} before every text" if special else "none is added"),
        ("leading blank", blank),
        (
            "padding side",
            f"{tokenizer.padding_side} (not used: editkit pads on the right, and on the left for "
            "generation)",
        ),
        ("pad token", f"{pad}" if pad else "none (not needed)"),
        (
            "sample",
            " ".join(
                f"[{piece}]" if index == position else piece for index, piece in enumerate(shown)
            ),
        ),
        ("target", " ".join(tokenizer.convert_ids_to_tokens(list(sequence.target_ids)))),
    )


def local_tokenizer(config: ModelConfig) -> tuple[Any, str | None]:
    """The tokenizer if this machine has it, otherwise None and the reason."""
    try:
        return config.load_tokenizer(is_local=True), None
    except ConfigError as error:
        reason = error.problems[0]
    is_slow = "slow tokenizer" in reason
    return (
        None,
        reason
        if is_slow
        else "this machine does not have the model's tokenizer: set model.tokenizer=<folder>, or "
        "load the model once",
    )
