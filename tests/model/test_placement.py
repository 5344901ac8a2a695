"""Several devices: blocks stay whole, edited matrices can be written, and the passes work with
accelerate's hooks.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from editkit.config.build import locate
from editkit.config.compose import compose
from editkit.errors import ConfigError
from editkit.linalg.lowrank import LowRank
from editkit.model.families import family_of
from editkit.model.placement import placement
from editkit.targets.keys import keys_and_outputs
from editkit.targets.search import search_targets
from tests.resources.test_footprint import settings_of_a_search
from tests.support.helpers import Kind, requests, tiny_model


def config(layers: int = 6) -> AutoConfig:
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "vocab_size": 500,
    }
    return AutoConfig.for_model("llama", **sizes)


def test_two_devices_share_the_blocks_which_stay_whole() -> None:
    num_bytes = 4 * 6 * 45_000
    devices = placement(
        config(),
        family_of("llama"),
        "float32",
        max_memory={0: num_bytes // 2 + 300_000, 1: num_bytes},
    )
    blocks = {name: device for name, device in devices.items() if name.startswith("model.layers.")}
    assert set(blocks.values()) == {0, 1}
    assert all(name.count(".") == 2 for name in blocks), "a block is never divided"
    assert sorted(blocks.values()) == [blocks[f"model.layers.{layer}"] for layer in range(6)], (
        "in their order"
    )


def test_weights_that_do_not_fit_are_refused_with_a_fix() -> None:
    with pytest.raises(
        ConfigError, match=r"model.device_map: the weights do not fit .* model.dtype=bfloat16"
    ):
        placement(config(), family_of("llama"), "float32", max_memory={0: 300_000, "cpu": 10**9})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_placement_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="this machine has no GPU"):
        placement(config(), family_of("llama"), "float32")


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_passes_through_accelerates_hooks_give_the_same_bits(kind: Kind) -> None:
    from accelerate import dispatch_model

    plain, hooked = tiny_model(kind), tiny_model(kind)
    names = [
        name
        for name, module in hooked.network.named_modules()
        if name and not list(module.children())
    ]
    dispatch_model(hooked.network, device_map=dict.fromkeys(names, "cpu"), force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in hooked.network.modules())
    site, results = plain.family.mlp(1), []
    for model in (plain, hooked):
        targets = search_targets(
            model,
            requests(2),
            site=site,
            contexts=("{}", "Then {}"),
            settings=settings_of_a_search(),
        )
        keys_CI, outputs_CO = keys_and_outputs(
            model, requests(1)[0], module=plain.family.down_projection(1), contexts=["{}"]
        )
        results.append([*(target.vector_O for target in targets), keys_CI, outputs_CO])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_an_offloaded_matrix_is_refused() -> None:
    from accelerate import cpu_offload

    model = tiny_model("llama")
    cpu_offload(model.network, execution_device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="offloaded"):
        model.edit([model.family.down_projection(0)])


def test_updates_reach_a_matrix_whose_base_is_on_another_device() -> None:
    near, far = tiny_model("gpt2"), tiny_model("gpt2")
    name = near.family.down_projection(0)
    near.edit([name])
    far.edit([name], base_device="cpu")
    update = LowRank(torch.ones(32, 1) / 7, torch.ones(128, 1) / 3)
    assert near.apply(name, update) == far.apply(name, update)
    assert torch.equal(near.weight(name), far.weight(name))


def test_an_editor_that_needs_one_device_is_refused_before_loading() -> None:
    overrides = ["model=tiny-gpt2", "model.device_map=auto", "edits=2"]
    composed = compose(overrides)
    locate(composed.config, choices=composed.choices)
    with pytest.raises(
        ConfigError,
        match=r"model\.device_map: editor=fakeeditor needs the whole model on one device \(got 'auto';",
    ):
        locate(composed.config | {"editor": {"_target_": "tests.support.fakes.FakeEditor"}})
