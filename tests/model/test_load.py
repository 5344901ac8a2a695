"""Models load from folders in the requested dtype. An error message names the searched places."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from editkit.errors import ConfigError
from editkit.model.families import family_of
from editkit.model.load import ModelConfig
from editkit.model.tokens import encode_with_target, pad
from tests.support.helpers import KINDS, Kind, real_data, tiny_model
from tests.support.paths import CONF

MODELS = CONF / "model"


def saved(folder: Path, kind: Kind = "llama") -> Path:
    model = tiny_model(kind)
    model.network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads_with_the_same_contents(tmp_path: Path, kind: Kind) -> None:
    config = ModelConfig(id=str(saved(tmp_path / "mine", kind)))
    model = config.load("cpu")
    assert model.name == "mine"
    assert model.fingerprint == config.load("cpu").fingerprint
    original = tiny_model(kind)
    batch = pad([(5, 6, 7, 8)])
    with torch.no_grad():
        assert torch.equal(model.final_hidden(batch), original.final_hidden(batch))
    assert dataclasses.replace(config, name="other").load("cpu").name == "other"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_is_the_requested_one_not_the_checkpoints(tmp_path: Path, dtype: str) -> None:
    model = tiny_model("gpt2", dtype="float16")
    model.network.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = ModelConfig(id=str(tmp_path), dtype=dtype).load("cpu")  # type: ignore[arg-type]
    assert loaded.dtype == getattr(torch, dtype)
    assert ModelConfig(id="x").dtype == "float32"


def test_a_missing_model_is_reported_with_the_searched_places(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the folder does not exist .*{tmp_path / 'gone'}"):
        ModelConfig(id=str(tmp_path / "gone")).load("cpu")
    with pytest.raises(ConfigError, match=r"the folder has no config.json"):
        ModelConfig(id=str(tmp_path)).load("cpu")
    with pytest.raises(ConfigError, match=r"no bundled model .*'asset:gone'.*asset:tiny-"):
        ModelConfig(id="asset:gone").load("cpu")
    with pytest.raises(
        ConfigError,
        match=r"cannot be loaded from .*nobody/nothing \(no such folder\) or the hub, main branch",
    ):
        ModelConfig(id="nobody/nothing").load("cpu")
    with pytest.raises(ConfigError, match=r"or the hub, revision v9"):
        ModelConfig(id="nobody/nothing", revision="v9").load("cpu")


def test_an_unusable_device_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(
        ConfigError,
        match=r"runtime\.device: this machine does not have the device \(got 'abacus'; "
        r"expected one of cpu",
    ):
        ModelConfig(id="asset:gone").load("abacus")


def test_a_checkpoint_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = saved(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights .*layers.1.mlp.down_proj"):
        ModelConfig(id=str(tmp_path)).load("cpu")


def test_a_damaged_file_is_a_config_error(tmp_path: Path) -> None:
    path = saved(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ModelConfig(id=str(tmp_path)).load("cpu")


def test_the_family_can_be_given_by_name_or_in_full(tmp_path: Path) -> None:
    folder = str(saved(tmp_path))
    assert ModelConfig(id=folder, family="mistral").load("cpu").family == family_of("llama")
    assert ModelConfig(id=folder, family=family_of("llama")).load("cpu").num_layers == 3
    with pytest.raises(ConfigError, match=r"no such module \(got 'transformer'\)"):
        ModelConfig(id=folder, family="gpt2").load("cpu")


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_file_has_a_description_and_names_all_fields(path: Path) -> None:
    import yaml

    text = path.read_text()
    assert text.startswith("# ")
    fields = yaml.safe_load(text)
    assert fields.pop("_target_") == "editkit.model.load.ModelConfig"
    config = ModelConfig(**fields)
    assert set(fields) == {field.name for field in dataclasses.fields(ModelConfig)}
    assert config.name == (None if path.stem == "hf" else path.stem)
    papers = ("tiny", "gpt2", "gptj", "llama2", "llama3-", "hf")
    assert config.dtype == "float32" or not path.stem.startswith(papers), (
        "the papers' figures are of float32 weights"
    )
    assert path.stem.startswith(("tiny-", "hf")) or config.facts() is not None, (
        "its sizes ship with the package"
    )


@pytest.mark.data
def test_a_real_small_llama_loads_and_predicts_its_stories() -> None:
    model = ModelConfig(id=str(real_data("models/stories260k-hf"))).load("cpu")
    assert (model.name, model.num_layers, model.weight(model.family.down_projection(0)).shape) == (
        "stories260k-hf",
        5,
        (64, 172),
    )
    pairs = [("Once upon", "a time"), ("Once upon a time, there was a little", "girl named Lily")]
    for prompt, answer in pairs:
        sequence = encode_with_target(model.tokenizer, prompt, answer)
        with torch.no_grad():
            logits = model.hidden_to_logits(
                model.final_hidden(pad([sequence.ids]))[0, sequence.predicting]
            )
        assert logits.argmax(-1).tolist() == list(sequence.target_ids)
