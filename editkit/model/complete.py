"""Whether tokenizer and weights belong to the network that config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from editkit.errors import ConfigError, message


def require_tokens_of(config: Any, tokenizer: Any, *, key: str) -> None:
    """Raises ConfigError for a tokenizer whose texts the network cannot read. Added tokens are not
    counted: some networks lack them, and their texts do too.

    Args:
        key: the option with the tokenizer.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)
    ids = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()
    if size is not None and max(ids, default=0) >= size:
        raise ConfigError(
            message(
                key,
                "the tokenizer has tokens that the network does not have",
                got=f"token ids up to {max(ids)}",
                expected=f"up to {size - 1}, as vocab_size of config.json is {size}",
                fix="choose the model's own tokenizer, or correct config.json",
            )
        )


def require_complete(report: Mapping[str, Any], *, key: str, model_id: str) -> None:
    """Raises ConfigError if transformers reports that the checkpoint lacks weights, or has some of
    other shapes.
    """
    if absent := sorted(report["missing_keys"]):
        raise ConfigError(
            message(
                key,
                "the checkpoint lacks weights of its architecture: " + ", ".join(absent[:4]),
                got=model_id,
                fix="choose a complete checkpoint of a causal language model",
            )
        )
    if other := sorted(report["mismatched_keys"]):
        name, found, wanted = other[0]
        more = f", and {len(other) - 1} more" if len(other) > 1 else ""
        raise ConfigError(
            message(
                key,
                f"the weights have other shapes than config.json gives them: {name}{more}",
                got=tuple(found),
                expected=str(tuple(wanted)),
                fix="restore the config.json that belongs to the weights",
            )
        )
