"""`editkit probe` without weights for named models, unknown architectures and tokenizers; random
weights of the real shapes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig
from typer.testing import CliRunner

from editkit.cli.main import app
from editkit.config.compose import conf_folder
from editkit.errors import ConfigError
from editkit.model.discover import guess_family
from editkit.model.families import family_of
from editkit.model.load import ModelConfig
from editkit.model.network import empty_network, random_network
from editkit.model.probe import behaviour, probe
from tests.support.helpers import tiny_tokenizer

NANO = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 2100,
    "n_positions": 64,
}


def named(name: str) -> ModelConfig:
    fields = yaml.safe_load((conf_folder() / "model" / f"{name}.yaml").read_text())
    del fields["_target_"]
    return ModelConfig(**fields)


@pytest.mark.parametrize(
    ("name", "kind", "is_transposed", "shape", "layers"),
    [
        ("gpt2-medium", "Conv1D", True, (1024, 4096), 24),
        ("gptj-6b", "Linear", False, (4096, 16384), 28),
        ("llama3.2-1b", "Linear", False, (2048, 8192), 16),
        ("gemma-2-2b", "Linear", False, (2304, 9216), 26),
    ],
)
def test_named_models_are_known_without_a_download(
    name: str, kind: str, is_transposed: bool, shape: Any, layers: int
) -> None:
    probed = probe(named(name))
    assert len(probed.matrices) == layers
    assert {(matrix.type, matrix.is_transposed, matrix.shape) for matrix in probed.matrices} == {
        (kind, is_transposed, shape)
    }
    assert probed.no_tokenizer is not None or probed.tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((conf_folder() / "model").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_named_model_can_be_probed(path: Path) -> None:
    if path.stem != "hf":
        assert probe(named(path.stem)).matrices


def test_the_command_shows_modules_shapes_tokenizer_and_memory() -> None:
    result = CliRunner().invoke(app, ["probe", "model=tiny-llama"])
    assert result.exit_code == 0, result.output
    for text in (
        "model.layers.0.mlp.down_proj ... ",
        "stored as (d_out, d_in)",
        "BOS: ",
        "leading blank: ",
        "memory",
        "statistics",
    ):
        assert text in result.output


def test_tokenizers_report_their_bos_and_their_blank() -> None:
    byte_level, sentencepiece = (
        dict(behaviour(tiny_tokenizer(kind))) for kind in ("gpt2", "llama")
    )
    assert byte_level["BOS"] == "none is added"
    assert sentencepiece["BOS"] == "<s> before every text"
    assert (
        byte_level["leading blank"]
        == sentencepiece["leading blank"]
        == "part of the target's first token"
    )
    assert "['s]" in byte_level["sample"], "the subject's last token"


def test_an_unknown_architecture_gets_suggested_module_names(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "persimmon",
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
    )
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        probe(ModelConfig(id=str(tmp_path)))
    text = str(caught.value)
    assert "the architecture is not known (got 'persimmon'" in text
    assert "blocks:model.layers" in text and "final_norm:model.final_layernorm" in text
    assert "down_projection_in_block:mlp.dense_4h_to_h" in text


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "gpt_neox", "llama", "qwen3"])
def test_the_guess_finds_the_names_of_known_families(kind: str) -> None:
    known, width = (
        family_of(kind),
        {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4}
        if kind.startswith("gpt")
        else {},
    )
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 100,
    }
    network = empty_network(
        AutoConfig.for_model(kind, **(width if kind in ("gpt2", "gptj") else sizes))
    )
    family = guess_family(network)
    assert family is not None
    assert (family.base, family.blocks, family.final_norm) == (
        known.base,
        known.blocks,
        known.final_norm,
    )
    assert family.down_projection(1) == known.down_projection(1) and family.mlp(1) == known.mlp(1)


def test_random_weights_are_seeded_and_leave_the_generators_alone() -> None:
    facts = {key: value for key, value in NANO.items() if key != "model_type"}
    before = torch.random.get_rng_state()
    first, second = (
        random_network(AutoConfig.for_model("gpt2", **facts), device="cpu", dtype="bfloat16")
        for _ in range(2)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    assert {parameter.dtype for parameter in first.parameters()} == {torch.bfloat16}


def test_random_weights_need_no_checkpoint_and_no_hub(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NANO))
    model = ModelConfig(id=str(tmp_path), weights="random").load("cpu")
    assert model.num_layers == 2 and len(model.tokenizer) == 2048, "the bundled tokenizer"
    with pytest.raises(ConfigError, match="the folder has no weights"):
        ModelConfig(id=str(tmp_path)).load("cpu")
    assert named("gpt2-xl").facts() is not None
