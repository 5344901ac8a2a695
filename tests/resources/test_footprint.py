"""The estimate of memory: sizes without torch, what is counted is counted to the byte, and what
does not fit is refused with advice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.config.build import memory_demand
from editkit.config.compose import compose
from editkit.errors import ConfigError
from editkit.model.architecture import architecture_of, facts_without_download, known_facts
from editkit.model.families import family_of
from editkit.model.network import empty_network
from editkit.resources.estimate import estimated, require_fit
from editkit.resources.footprint import Demand
from editkit.resources.peak_memory import Peaks
from editkit.stats.collect import MomentSum
from editkit.stats.store import MomentKey, Moments, mapped_into, read, write
from editkit.targets.settings import TargetSettings

ASSETS = ("tiny-gpt2", "tiny-gptj", "tiny-llama")


def settings_of_a_search() -> TargetSettings:
    return TargetSettings(
        steps=4,
        lr=0.3,
        lr_unit="relative",
        weight_decay=1e-3,
        clamp=4.0,
        kl_factor=0.06,
        kl_position="subject_last",
        stop_loss=0.0,
        exact=False,
    )


def composed(*overrides: str) -> dict[str, Any]:
    return compose(list(overrides)).config


def demand(*overrides: str) -> Demand:
    composed = compose(list(overrides))
    return memory_demand(composed.config, choices=composed.choices)


def test_parameters_and_shapes_are_those_of_the_network_that_transformers_builds() -> None:
    from transformers import AutoConfig

    distinct = (
        "gpt2",
        "gptj-6b",
        "gpt-neox-20b",
        "llama3.2-1b",
        "qwen2.5-7b",
        "qwen3-8b",
        "mistral-7b",
        "gemma-2-2b",
    )
    facts = {name: known_facts()[name] for name in distinct} | {
        name: facts_without_download(name, f"asset:{name}") or {} for name in ASSETS
    }
    for name, each in facts.items():
        size = architecture_of(each).of_depth(2)
        kind = size.facts["model_type"]
        plain = {
            key: value
            for key, value in size.facts.items()
            if key not in ("model_type", "layer_types", "transformers_version")
        }
        network = empty_network(AutoConfig.for_model(kind, **plain))
        assert size.num_parameters == sum(
            parameter.numel() for parameter in network.parameters()
        ), name
        shape = tuple(network.get_submodule(family_of(kind).down_projection(1)).weight.shape)
        assert shape == (
            (size.inner, size.width) if kind == "gpt2" else (size.width, size.inner)
        ), name


def test_known_models_have_their_published_sizes() -> None:
    published = {
        "gpt2-xl": 1_557_611_200,
        "gptj-6b": 6_050_882_784,
        "llama2-7b": 6_738_415_616,
        "llama3-8b": 8_030_261_248,
    }
    published |= {
        "llama2-13b": 13_015_864_320,
        "mistral-7b": 7_241_732_096,
        "qwen2.5-7b": 7_615_616_512,
        "gemma-2-2b": 2_614_341_888,
    }
    found = known_facts()
    assert {name: architecture_of(found[name]).num_parameters for name in published} == published


def test_weights_masters_and_statistics_are_counted_to_the_byte() -> None:
    found = estimated(
        demand("model=llama3-8b", "editor=memit", "runtime=cuda", "model.dtype=bfloat16", "edits=3")
    )
    assert found is not None
    matrix, square = 4096 * 14336, 14336**2
    assert found.on_device.weights == 2 * 8_030_261_248
    assert found.on_device.masters == 5 * (matrix * (2 + 2 * 4) + 3 * (4096 + 14336) * 4), (
        "W_0, the total twice, its factors"
    )
    assert found.on_device.statistics == 5 * square * (8 + 8)
    assert found.limit is None and found.fits


def test_what_is_kept_elsewhere_leaves_the_device() -> None:
    near = estimated(demand("model=llama3-8b", "editor=memit", "runtime=gpu80"))
    far = estimated(demand("model=llama3-8b", "editor=memit", "runtime=gpu24"))
    assert near is not None and far is not None
    assert far.on_device.statistics == 0 and far.on_host.statistics == near.on_device.statistics
    assert far.on_device.masters + far.on_host.masters == near.on_device.masters
    mapped = estimated(
        demand("model=llama3-8b", "editor=memit", "runtime=gpu80", "runtime.statistics=disk")
    )
    assert mapped is not None and mapped.on_host.statistics == 0 and mapped.disk > near.disk


def test_rome_without_covariance_and_ft_need_no_statistics_and_d4s_remembers() -> None:
    def statistics(*overrides: str) -> float:
        found = estimated(demand("model=gpt2-xl", "runtime=cuda", *overrides))
        assert found is not None
        return found.on_device.statistics

    square = 6400**2
    assert statistics("editor=rome") == 16 * square
    assert statistics("editor=rome", "editor.covariance=null") == statistics("editor=ft") == 0
    assert statistics("editor=memit", "solve.dtype=float32") == 5 * 12 * square
    assert statistics("editor=d4s", "edits=5000") == 5 * (16 + 8) * square


def test_a_run_that_does_not_fit_is_refused_with_advice() -> None:
    with pytest.raises(ConfigError) as caught:
        require_fit(demand("model=llama3-8b", "editor=d4s", "runtime=gpu24"))
    text = str(caught.value)
    assert "runtime.memory_gb: cuda has 23 GB, the run would take about" in text
    assert "model.dtype=bfloat16 (saves 16 GB)" in text and "device_map=auto" in text
    assert require_fit(
        demand("model=llama3-8b", "editor=d4s", "runtime=gpu80", "model.dtype=bfloat16")
    )
    with pytest.raises(ConfigError, match="cuda has 10 GB"):
        require_fit(demand("model=llama2-7b", "editor=rome", "runtime=cuda"), free_bytes=10e9)


def test_a_model_that_only_the_hub_knows_is_not_guessed() -> None:
    assert estimated(demand("model=hf", "model.id=somebody/something")) is None


def test_statistics_mapped_from_disk_solve_to_the_same_bits_and_leave_no_file(
    tmp_path: Path,
) -> None:
    generator = torch.Generator().manual_seed(0)
    keys_NI = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    key = MomentKey(
        model="m",
        fingerprint="f",
        module="x",
        corpus="c",
        num_documents=1,
        context_length=8,
        dtype="float32",
        products="float32",
    )
    path = write(tmp_path, key, MomentSum(keys_NI.T @ keys_NI, 40))
    asked = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    plain, mapped = (
        Moments({"x": read(path, key, keep=keep)}) for keep in (None, mapped_into(tmp_path))
    )
    assert torch.equal(plain.inverse_times("x", asked), mapped.inverse_times("x", asked))
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_the_peak_of_a_phase_is_its_own() -> None:
    peaks = Peaks("cpu")
    with peaks.phase("large"):
        large = torch.ones(40_000_000)
        del large
    with peaks.phase("small"):
        pass
    found = peaks.bytes
    assert set(found) == {"measuring", "large", "small"}
    if found["large"]:  # where the system tells
        assert found["large"] - found["small"] > 100e6
    assert set(Peaks().bytes) == set(), "without a device nothing is noted"
