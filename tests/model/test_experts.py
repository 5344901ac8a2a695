"""One expert of a mixture is edited like a matrix of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.linalg.lowrank import LowRank
from editkit.model.capture import capture
from editkit.model.editable import EditableModel
from editkit.model.families import known_mixtures
from editkit.model.load import ModelConfig
from editkit.model.tokens import pad
from editkit.stats.collect import collect
from tests.model.test_shortcuts import assert_close, comparisons
from tests.support.families import INNER, MIXTURES, WIDTH, family_config, family_model

EXPERT = 2
TEXT = "The mother tongue of Danielle Darrieux is French, and she was born in Bordeaux."


def logits(network: Any, ids: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = network(torch.tensor([ids])).logits[0]
    return result


def without_expert(kind: str) -> Any:
    """The same network as transformers builds it."""
    from transformers import AutoModelForCausalLM

    model = family_model(kind, expert=EXPERT)
    network = AutoModelForCausalLM.from_config(family_config(kind)).eval()
    network.load_state_dict(model.network.state_dict())
    return model, network


def test_every_known_mixture_is_tried() -> None:
    assert set(MIXTURES) == set(known_mixtures())


@pytest.mark.parametrize("kind", sorted(MIXTURES))
def test_an_edit_of_an_expert_changes_its_slice_and_what_the_plain_network_computes_with_it(
    kind: str,
) -> None:
    model, plain = without_expert(kind)
    ids = model.tokenizer(TEXT)["input_ids"]
    torch.testing.assert_close(logits(model.network, ids), logits(plain, ids), rtol=1e-4, atol=1e-4)
    [module] = model.down_projections([1])
    weight_OI = model.weight(module)
    assert weight_OI.shape == (WIDTH, INNER)
    model.edit([module])
    generator = torch.Generator().manual_seed(0)
    update = LowRank(
        torch.randn(WIDTH, 1, generator=generator), torch.randn(INNER, 1, generator=generator)
    )
    model.apply(module, update)
    experts = plain.get_submodule(model.family.experts(1))
    dense_OI = update.left_OR @ update.right_IR.T
    with torch.no_grad():
        experts.down_proj[EXPERT] += dense_OI.T if experts.is_transposed else dense_OI
    before = logits(without_expert(kind)[0].network, ids)
    ours, expected = logits(model.network, ids), logits(plain, ids)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, before, atol=1e-2)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.network.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", sorted(MIXTURES))
def test_every_shortcut_of_an_experts_edit_equals_the_plain_computation(kind: str) -> None:
    found = comparisons(family_model(kind, expert=EXPERT))
    names = {each.shortcut for each in found}
    assert names == {"search", "keys", "scoring", "generation"}
    assert_close(found)


def test_second_moments_are_those_of_the_tokens_that_the_expert_gets() -> None:
    model = family_model("mixtral", expert=EXPERT)
    [module] = model.down_projections([1])
    found = collect(model, [module], [TEXT], context_length=64, batch_tokens=64)[module]
    ids = model.tokenizer(TEXT)["input_ids"]
    experts = model.module(model.family.experts(1))
    with torch.no_grad(), capture(model, inputs=[model.family.experts(1)]) as captured:
        model.final_hidden(pad([ids]))
    block = model.module(f"{model.family.block(1)}.mlp")
    hidden_ND = captured.inputs[model.family.experts(1)][0]
    with torch.no_grad():
        _, _, indices_NK = block.gate(hidden_ND)
        up_NJ = hidden_ND @ experts.gate_up_proj[EXPERT].T
        gate_NI, up_NI = up_NJ.chunk(2, dim=-1)
        is_here_N = (indices_NK == EXPERT).any(dim=1)
        keys_MI = (torch.nn.functional.silu(gate_NI) * up_NI)[is_here_N].double()
    assert 0 < len(keys_MI) < len(ids) == found.num_tokens
    torch.testing.assert_close(found.sum_II, keys_MI.T @ keys_MI, rtol=1e-4, atol=1e-5)


def test_an_edited_expert_is_saved_and_loaded_like_any_weights(tmp_path: Path) -> None:
    model = family_model("mixtral", expert=EXPERT)
    [module] = model.down_projections([0])
    model.edit([module])
    model.apply(module, torch.ones(WIDTH, INNER))
    model.network.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = ModelConfig(id=str(tmp_path), expert=EXPERT).load()
    assert torch.equal(loaded.weight(module), model.weight(module))
    other = ModelConfig(id=str(tmp_path), expert=0).load()
    assert other.fingerprint == loaded.fingerprint
    assert not torch.equal(other.weight(other.down_projections([0])[0]), model.weight(module))


def test_an_expert_that_does_not_exist_is_one_message() -> None:
    config = family_config("mixtral")
    with pytest.raises(ConfigError, match=r"model.expert: no such expert .got 4; expected 0 to 3"):
        ModelConfig(id="x", expert=4).family_of(config)
    with pytest.raises(
        ConfigError, match=r"model.expert: only a mixture .*got 0; expected null, or"
    ):
        ModelConfig(id="x", expert=0).family_of(family_config("llama"))
    with pytest.raises(ConfigError, match=r"Fix: set model.expert to the expert that is edited"):
        ModelConfig(id="x").family_of(config)


def test_a_user_can_name_the_experts_of_an_unknown_mixture() -> None:
    from dataclasses import replace

    known = known_mixtures()["mixtral"]
    config = family_config("mixtral")
    assert ModelConfig(id="x", family=known, expert=1).family_of(config).expert == 1
    with pytest.raises(ConfigError, match=r"model.expert: .*is no module of experts"):
        family_model("mixtral", family=replace(known, experts_in_block="mlp.gate"), expert=1)


def shape_of(model: EditableModel) -> int:
    return sum(parameter.numel() for parameter in model.network.parameters())


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen2_moe"])
def test_the_memory_estimate_counts_all_experts(kind: str) -> None:
    from editkit.model.architecture import architecture_of

    model = family_model(kind, expert=EXPERT)
    counted = architecture_of(model.network.config.to_dict()).num_parameters
    assert counted == pytest.approx(shape_of(model), rel=0.02)
