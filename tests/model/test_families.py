"""The table of module names agrees with the networks that transformers builds."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from editkit.errors import ConfigError
from editkit.model.families import check_family, family_of, known_families
from tests.support.helpers import KINDS, tiny_model

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_SIZES = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "vocab_size": 64,
    "rotary_dim": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def network_of(model_type: str) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **(GPT_SIZES if model_type in ("gpt2", "gptj") else SIZES))
    ).eval()


@pytest.mark.parametrize("model_type", sorted(known_families()))
def test_every_known_family_names_modules_that_exist(model_type: str) -> None:
    network, family = network_of(model_type), family_of(model_type)
    assert check_family(family, network) == 2
    hidden = torch.randn(1, 3, 32)
    projection = network.get_submodule(family.down_projection(1))
    assert "down" in family.down_projection(1) or projection.weight.shape != hidden.shape
    base = network.get_submodule(family.base)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        normed = base(ids, use_cache=False).last_hidden_state
        logits = network.get_output_embeddings()(normed)
        if cap := getattr(network.config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        torch.testing.assert_close(logits, network(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_down_projection_maps_the_inner_width_to_the_residual_width(kind: str) -> None:
    model = tiny_model(kind)  # type: ignore[arg-type]
    rows, columns = model.weight(model.family.down_projection(0)).shape
    assert rows == 32
    assert columns > 32


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"not known \(got 'mamba'; expected one of .*gpt2.*llama"
    ):
        family_of("mamba")


def test_a_wrong_name_lists_the_nearest_modules() -> None:
    network = network_of("llama")
    with pytest.raises(
        ConfigError, match=r"no such module \(got 'model.layer'\).*nearest.*model.layers"
    ):
        check_family(dataclasses.replace(family_of("llama"), blocks="model.layer"), network)
    with pytest.raises(
        ConfigError, match=r"no such module \(got 'model.layers.0.mlp.down'\).*nearest.*down_proj"
    ):
        check_family(
            dataclasses.replace(family_of("llama"), down_projection_in_block="mlp.down"), network
        )
