"""A model's folder with something wrong in it gives one message, before the weights are read where
that is possible.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.errors import ConfigError
from editkit.model.load import ModelConfig
from tests.support.helpers import tiny_model


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "sound"
    model = tiny_model("gpt2")
    model.network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "mine"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def message_of(config: ModelConfig) -> str:
    with pytest.raises(ConfigError) as raised:
        config.load("cpu")
    assert "\n" not in str(raised.value) and len(raised.value.problems) == 1
    return str(raised.value)


Damage = Callable[[Path], Any]
BEFORE: list[tuple[Damage, str]] = [
    (lambda folder: (folder / "config.json").write_text("[]"), "it holds no object but a list"),
    (lambda folder: (folder / "config.json").write_text("{}"), "it names no architecture"),
    (lambda folder: (folder / "config.json").write_text('{"a":'), "malformed JSON in line 1, column 6"),
    (lambda folder: (folder / "config.json").write_text("[" * 10**5), "it is not JSON that can be read"),
    (lambda folder: (folder / "config.json").write_text(f'{{"a": {"9" * 5000}}}'), "it is not JSON that can be read"),
    (lambda folder: (folder / "config.json").write_bytes(b'{"\xe9": 1}'), "byte 2 is not UTF-8"),
    (lambda folder: (folder / "generation_config.json").write_text("[]"), "it holds no object but a list"),
    (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "it holds no object but a list"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "the folder has no tokenizer"),
    (lambda folder: (folder / "model.safetensors").unlink(), "the folder has no weights"),
]  # fmt: skip
LOADING: list[tuple[Damage, str]] = [
    (lambda folder: (folder / "tokenizer.json").write_text('{"a":1}'), "it describes no tokenizer"),
    (lambda folder: (folder / "tokenizer.json").write_text("[]"), "it holds no object but a list"),
    (lambda folder: (folder / "tokenizer.json").write_text("{"), "malformed JSON in line 1"),
    (lambda folder: (folder / "tokenizer.json").write_text('{"model": {}, "added_tokens": []}'), "cannot be loaded"),
    (lambda folder: change_config(folder, vocab_size=10**4), "transformer.wte.weight (got ("),
    (lambda folder: change_config(folder, vocab_size=9), "expected up to 8, as vocab_size of config.json is 9"),
    (lambda folder: change_config(folder, n_layer=9), "the checkpoint lacks weights of its architecture: transformer.h.3."),
    (lambda folder: change_config(folder, n_inner=3), "transformer.h.0.mlp.c_fc.bias, and 8 more (got (128,); expected (3,))"),
    (lambda folder: change_config(folder, n_embd="x"), "'n_embd'"),
    (lambda folder: change_config(folder, n_embd=7), "must be divisible by num_heads"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "told"), BEFORE, ids=lambda each: each if isinstance(each, str) else ""
)
def test_what_small_files_show_is_told_before_anything_is_loaded(
    folder: Path, damage: Damage, told: str
) -> None:
    damage(folder)
    config = ModelConfig(id=str(folder))
    (problem,) = config.source_problems()
    assert told in problem and problem.startswith("model.id: ") and "(" in problem
    assert message_of(config) == problem


@pytest.mark.parametrize(
    ("damage", "told"), LOADING, ids=lambda each: each if isinstance(each, str) else ""
)
def test_what_only_loading_shows_is_one_message(
    folder: Path, damage: Damage, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    config = ModelConfig(id=str(folder))
    assert config.source_problems() == []
    assert told in message_of(config)
    assert capfd.readouterr().err == "", "transformers adds nothing of its own"


def test_a_tokenizer_of_another_model_is_named_by_its_option(folder: Path) -> None:
    config = ModelConfig(id=str(folder), tokenizer="asset:tiny-gpt2")
    (folder / "tokenizer.json").unlink()
    assert ModelConfig(id=str(folder), tokenizer=str(folder)).source_problems() == []
    larger = Path(__file__).parents[2] / "editkit/assets/tiny-gpt2"
    config = ModelConfig(id=str(folder), tokenizer=str(larger))
    assert message_of(config).startswith(
        "model.tokenizer: the tokenizer has tokens that the network does not have (got "
    )


@pytest.mark.parametrize("name", ["/" + "x" * 5000, "x" * 300, "a/" * 2500, "package:" + "x" * 300])
def test_a_name_that_no_file_can_have_is_one_short_message(name: str) -> None:
    (problem,) = ModelConfig(id=name).source_problems()
    assert problem.startswith("model.id: the name is too long (got ") and len(problem) < 500


def test_a_missing_or_damaged_tokenizer_is_named_by_its_option(
    folder: Path, tmp_path: Path
) -> None:
    gone = ModelConfig(id=str(folder), tokenizer=str(tmp_path / "gone"))
    assert gone.source_problems() == [message_of(gone)]
    assert message_of(gone).startswith("model.tokenizer: the folder does not exist (got ")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("[]")
    damaged = ModelConfig(id=str(folder), tokenizer=str(tmp_path / "other"))
    assert message_of(damaged).startswith(
        f"model.tokenizer: {tmp_path}/other/tokenizer.json: it holds no "
    )
    of_hub = ModelConfig(id=str(folder), tokenizer="nobody/nothing")
    assert message_of(of_hub).startswith("model.tokenizer: the tokenizer cannot be loaded from ")


def test_pickled_weights_of_the_hub_are_refused(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*_: Any, use_safetensors: bool | None = None, **__: Any) -> None:
        assert use_safetensors
        raise OSError(
            "x does not appear to have a file named model.safetensors. Please do not set `use_safetensors=True`."
        )

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    problem = message_of(ModelConfig(id=str(folder)))
    assert (
        "its weights are Python pickles" in problem
        and "Fix: set model.allow_pickle=true, with" in problem
    )


def pickle_weights(folder: Path) -> None:
    network = tiny_model("gpt2").network
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")


def test_pickled_weights_are_refused_with_the_command_that_converts_them(
    folder: Path, sound: Path
) -> None:
    pickle_weights(folder)
    (problem,) = ModelConfig(id=str(folder)).source_problems()
    assert (
        "the weights are Python pickles" in problem and "or set model.allow_pickle=true" in problem
    )
    python, option, code = shlex.split(problem.partition("`")[2].partition("`")[0])
    assert (python, option) == ("python", "-c")
    exec(code)
    converted = ModelConfig(id=f"{folder}-safetensors").load("cpu")
    assert converted.fingerprint == ModelConfig(id=str(sound)).load("cpu").fingerprint


def test_pickled_weights_load_when_they_are_allowed(folder: Path, sound: Path) -> None:
    pickle_weights(folder)
    config = ModelConfig(id=str(folder), allow_pickle=True)
    assert config.source_problems() == []
    assert config.load("cpu").fingerprint == ModelConfig(id=str(sound)).load("cpu").fingerprint


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def test_a_hostile_pickle_is_one_message_and_is_not_run(folder: Path, tmp_path: Path) -> None:
    pickle_weights(folder)
    config, path = ModelConfig(id=str(folder), allow_pickle=True), folder / "pytorch_model.bin"
    torch.save({"transformer.wte.weight": Hostile(tmp_path / "made")}, path)
    told = "the pickled weights hold something else than tensors, or are damaged; nothing of them was run"
    assert told in message_of(config)
    assert not (tmp_path / "made").exists()
    for content in (b"", b"cos\nsystem\n(S'false'\ntR.", path.read_bytes()[:500]):
        path.write_bytes(content)
        assert told in message_of(config)
    torch.save([1, 2], path)
    assert told in message_of(config)
