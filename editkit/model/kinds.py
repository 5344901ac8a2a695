"""Which transformers configurations are those of a decoder that can be edited, and which class
loads them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from editkit.errors import ConfigError, message
from editkit.model.families import Family, family_of, known_families

DECODER = "a decoder with one matrix from each MLP's inner width to the residual stream"
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def family_of_config(config: Any) -> Family:
    """The family of a configuration. That of a multimodal one is its language model's.

    Raises:
        ConfigError: an unknown architecture.
    """
    text = config.get_text_config()
    family = _as_configured(family_of(str(text.model_type)), text)
    return family if text is config else _inside(family)


def require_decoder(config: Any) -> None:
    """Raises ConfigError, with the reason, for an architecture that module names do not help."""
    kind = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        problem = "an encoder-decoder cannot be edited, only a decoder"
        raise ConfigError(message("model.id", problem, got=kind, expected=DECODER))
    text = config.get_text_config()
    if text.model_type not in known_families() and any(
        (getattr(text, name, None) or 0) > 1 for name in NUM_EXPERTS
    ):
        problem = (
            "a mixture of experts without a shared expert cannot be edited: each token is sent to "
            "other experts, so that no single matrix maps a subject's key to its value"
        )
        fix = "choose a dense model, or qwen2_moe, whose shared expert is edited"
        raise ConfigError(message("model.id", problem, got=kind, expected=DECODER, fix=fix))


def auto_class(config: Any) -> Any:
    """The transformers class that loads a configuration: a causal language model, or a multimodal
    one around it.
    """
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    kind = config.model_type
    if (
        kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def _as_configured(family: Family, config: Any) -> Family:
    """The family with what differs between its models."""
    if getattr(config, "alibi", False):  # some Falcons
        family = replace(family, follows_position_ids=False)
    if config.model_type == "opt" and not config.do_layer_norm_before:  # OPT-350M
        family = replace(family, final_norm=None, adds_mlp_output=False)
    return family


def _inside(family: Family) -> Family:
    """The module names of a language model inside a multimodal network."""

    def within(name: str) -> str:
        return f"model.language_model{name.removeprefix('model')}"

    return replace(
        family,
        base=within(family.base),
        blocks=within(family.blocks),
        final_norm=family.final_norm and within(family.final_norm),
    )
