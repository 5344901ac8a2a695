"""The file of a hypernetwork: a damaged one is refused, and those of earlier versions load."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from editkit.errors import OptionError
from tests.support.helpers import tiny_model
from tests.support.hypernets import facts, load_hypernetwork, mend, saved


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tiny_model("gpt2"), tmp_path, layers=(1,), trained=tuple(facts(3)))


def test_a_flipped_bit_anywhere_is_noticed(file: Path) -> None:
    content = file.read_bytes()
    end_of_header = 8 + int.from_bytes(content[:8], "little")
    places = [*range(0, end_of_header, 41), *range(end_of_header, len(content), 997)]
    for place in [*places, len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(OptionError, match=r"^hypernetwork: "):
            load_hypernetwork(str(file))
    file.write_bytes(content)
    assert load_hypernetwork(str(file))


def test_it_is_noticed_before_a_model_is_loaded(file: Path) -> None:
    class Data:
        digest = "d"

    assert mend(file).check_requests(Data(), facts(12)[4:]) == []  # type: ignore[arg-type]
    content = bytearray(file.read_bytes())
    content[-100] ^= 64
    file.write_bytes(content)
    (problem,) = mend(file).check_requests(Data(), facts(12)[4:])  # type: ignore[arg-type]
    assert f"{file} is damaged: it does not match its checksum. Fix: restore the file" in problem


def test_other_text_between_prompt_and_target_than_in_the_training_is_refused(
    file: Path, tmp_path: Path
) -> None:
    class Data:
        digest = "d"

    edits = facts(12)[4:]
    for other in ([replace(edits[0], separator="\n"), *edits[1:]], facts(12, separator="\n")[4:]):
        (problem,) = mend(file).check_requests(Data(), other)  # type: ignore[arg-type]
        assert (
            "other text between prompt and target (got ['\\n']; expected ' '). Fix: set dataset.s"
            in (problem)
        )
    trained = tuple(facts(3, separator="\n"))
    own = saved(tiny_model("gpt2"), tmp_path, layers=(1,), trained=trained)
    assert mend(own).check_requests(Data(), other) == []  # type: ignore[arg-type]
    (problem,) = mend(own).check_requests(Data(), edits)  # type: ignore[arg-type]
    assert "(got [' ']; expected '\\n')" in problem


def test_a_file_of_an_earlier_version_has_no_checksum_and_loads(file: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    network, header = load_hypernetwork(str(file))
    length = int.from_bytes(file.read_bytes()[:8], "little")
    described = json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]["editkit"]
    former = {**json.loads(described), "format": 1}
    assert len(former.pop("sha256")) == 64
    assert former.pop("separators") == [" "]
    save_file(tensors, file, metadata={"editkit": json.dumps(former)})
    again, same = load_hypernetwork(str(file))
    assert same == header
    assert all(torch.equal(again.tensors[name], each) for name, each in network.tensors.items())


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-llama"])
def test_the_bundled_ones_have_a_checksum(name: str, tmp_path: Path) -> None:
    import editkit

    source = Path(editkit.__file__).parent / "assets/mend" / name / "hypernetwork.safetensors"
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(content)
    assert load_hypernetwork(f"asset:mend/{name}")
    with pytest.raises(OptionError, match="does not match its checksum"):
        load_hypernetwork(str(tmp_path / "flipped.safetensors"))
