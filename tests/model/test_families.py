"""The table of module names agrees with the networks that transformers builds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.model.architecture import EAGER
from editkit.model.editable import EditableModel
from editkit.model.families import check_family, family_of, known_families
from editkit.model.load import ModelConfig
from editkit.model.network import random_network
from editkit.model.tokens import pad
from editkit.runner.self_check import check_reading
from editkit.stats.estimate import estimate
from editkit.targets.self_check import compare_search
from tests.support.families import (
    CONFIGS,
    INNER,
    MIXTURES,
    POSITIONS,
    WIDTH,
    family_config,
    family_model,
)
from tests.support.helpers import KINDS, request, tiny_model, tiny_tokenizer

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


def network_of(model_type: str, **sizes: Any) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SIZES | sizes)
    return AutoModelForCausalLM.from_config(config).eval()


def test_every_known_family_is_tried() -> None:
    assert set(CONFIGS) == set(known_families())


@pytest.mark.parametrize("kind", sorted(known_families()))
def test_every_known_family_names_modules_that_exist(kind: str) -> None:
    model = family_model(kind, num_layers=2)
    assert check_family(model.family, model.network) == model.num_layers == 2
    for name in (*model.mlp_matrices([0, 1]), *model.down_projections([0, 1])):
        rows, columns = model.weight(name).shape
        is_down = name in model.down_projections([0, 1])
        assert (rows if is_down else columns) == WIDTH < (columns if is_down else rows)
    assert model.down_projections([1])[0] == model.mlp_matrices([1])[-1]
    assert model.weight(model.family.attention(1)).shape[0] == WIDTH
    batch = pad([(3, 4, 5, 6, 300)])
    with torch.no_grad():
        logits = model.hidden_to_logits(model.final_hidden(batch)[0])
        torch.testing.assert_close(logits, model.network(batch.ids_BT).logits[0])


@pytest.mark.parametrize("kind", sorted(CONFIGS | MIXTURES))
def test_the_families_without_fused_attention_are_those_that_transformers_says(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    class_of = AutoModelForCausalLM._model_mapping[type(family_config(kind))]
    assert (not class_of._supports_sdpa) == (kind in EAGER)


@pytest.mark.parametrize(
    ("kind", "is_matrix"),
    [("llama", True), ("gemma2", False), ("cohere", False), ("granite", False)],
)
def test_logits_that_are_capped_or_scaled_are_the_networks_own(kind: str, is_matrix: bool) -> None:
    model = family_model(kind, num_layers=2)
    assert model.head_is_matrix == is_matrix
    hidden_ND = torch.randn(3, WIDTH, requires_grad=True)
    logits_NV = model.hidden_to_logits(hidden_ND)
    products_NV = model.network.get_output_embeddings()(hidden_ND)
    assert torch.equal(logits_NV, products_NV) == is_matrix
    (gradient_ND,) = torch.autograd.grad(logits_NV.square().sum(), hidden_ND)
    assert float(gradient_ND.abs().min()) > 0


@pytest.mark.parametrize(("kind", "inner"), [("gemma3", "gemma3_text"), ("llava", "llama")])
def test_the_language_model_of_a_multimodal_network_is_found(kind: str, inner: str) -> None:
    from transformers import AutoConfig

    text = family_config(inner, num_layers=2).to_dict()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "model_type": "siglip_vision_model",
    }
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision)
    network = random_network(config, device="cpu", dtype="float32")
    family = ModelConfig(id=kind).family_of(network.config)
    assert family == replace(
        family_of(inner),
        base="model.language_model",
        blocks="model.language_model.layers",
        final_norm="model.language_model.norm",
    )
    model = EditableModel(network, tiny_tokenizer("llama"), name=kind, family=family)
    assert model.max_length == POSITIONS
    assert check_reading(model, "The mother tongue of Danielle Darrieux is French.") == []
    config_of_stats: Any = SimpleNamespace(context_length=32, batch_tokens=64)
    amounts = estimate(model, model.down_projections([1]), config_of_stats, num_documents=3)
    assert amounts.size == INNER
    site = family.block(0)
    [comparison] = compare_search(model, request(), site)
    assert comparison.agrees


def test_a_checkpoint_in_several_files_is_the_same_model(tmp_path: Path) -> None:
    for kind in ("olmo2", "bloom"):
        model, folder = family_model(kind), tmp_path / kind
        model.network.save_pretrained(folder, max_shard_size="40KB")
        model.tokenizer.save_pretrained(folder)
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        loaded = ModelConfig(id=str(folder)).load()
        assert loaded.fingerprint == model.fingerprint
        assert loaded.family == model.family


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("t5", "an encoder-decoder cannot be edited, only a decoder .got 't5'"),
        ("bart", "an encoder-decoder cannot be edited"),
        ("mixtral", "a mixture of experts without a shared expert has no single matrix"),
        ("qwen3_moe", "a mixture of experts .*Fix: set model.expert to the expert that is edited"),
        ("deepseek_v3", "a mixture .*Fix: choose a dense model, or one of the mixtures gpt_oss"),
    ],
)
def test_an_architecture_without_one_matrix_a_block_is_refused_with_the_reason(
    kind: str, message: str
) -> None:
    from transformers import AutoConfig

    with pytest.raises(ConfigError, match=f"model.id: {message}"):
        ModelConfig(id=kind).family_of(AutoConfig.for_model(kind))


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
        check_family(replace(family_of("llama"), blocks="model.layer"), network)
    with pytest.raises(
        ConfigError, match=r"no such module \(got 'model.layers.0.mlp.down'\).*nearest.*down_proj"
    ):
        check_family(replace(family_of("llama"), down_projection_in_block="mlp.down"), network)
