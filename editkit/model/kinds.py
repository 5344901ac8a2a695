"""Which transformers configurations are those of a decoder that can be edited, and which class
loads them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from editkit.errors import ConfigError, message
from editkit.model.architecture import NUM_EXPERTS
from editkit.model.experts import require_expert
from editkit.model.families import Family, family_of, known_families, known_mixtures

DECODER = "a decoder with one matrix from each MLP's inner width to the residual stream"


def family_of_config(config: Any) -> Family:
    """The family of a configuration. That of a multimodal one is its language model's.

    Raises:
        ConfigError: an unknown architecture.
    """
    text = config.get_text_config()
    family = _as_configured(family_of(str(text.model_type)), text)
    return family if text is config else _inside(family)


def family_of_expert(config: Any, expert: int, given: Family | str | None = None) -> Family:
    """The family of a mixture of experts of which one is edited.

    Args:
        given: module names, or the name of a mixture with the same ones; None: by the
            configuration.

    Raises:
        ConfigError: no known mixture, or one without this expert.
    """
    text, mixtures = config.get_text_config(), known_mixtures()
    kind = given or str(text.model_type)
    family = kind if isinstance(kind, Family) else mixtures.get(kind)
    if family is None or family.experts_in_block is None:
        problem = "only a mixture of experts has experts to choose from"
        expected = f"null, or one of the models {', '.join(sorted(mixtures))}"
        raise ConfigError(message("model.expert", problem, got=expert, expected=expected))
    if number := num_experts(text):  # else the network tells
        require_expert(expert, number)
    family = family.of_expert(expert)
    return family if text is config or isinstance(given, Family) else _inside(family)


def num_experts(config: Any) -> int:
    """The experts that a block's router chooses from; 0 without a router."""
    return next((number for name in NUM_EXPERTS if (number := getattr(config, name, None))), 0)


def require_decoder(config: Any) -> None:
    """Raises ConfigError, with the reason, where a block has no single matrix to edit."""
    kind = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        problem = "an encoder-decoder cannot be edited, only a decoder"
        raise ConfigError(message("model.id", problem, got=kind, expected=DECODER))
    text = config.get_text_config()
    kind = str(text.model_type)
    if kind not in known_families() and num_experts(text) > 1:
        problem = (
            "a mixture of experts without a shared expert has no single matrix that maps a "
            "subject's key to its value: each token is sent to other experts"
        )
        mixtures = known_mixtures()
        fix = f"choose a dense model, or one of the mixtures {', '.join(sorted(mixtures))}"
        if kind in mixtures:
            fix = "set model.expert to the expert that is edited"
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
