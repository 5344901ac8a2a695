"""The files of checkpoints: the same bytes as earlier versions of editkit wrote, for runs and
trainings.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from editkit.errors import ConfigError
from editkit.hypernet.learning import LearningState
from editkit.runner.checkpoint import (
    Checkpoint,
    load_state,
    read_checkpoint,
    save_state,
    write_checkpoint,
)
from editkit.training.session import checkpoint_of, learning_state
from tests.support.paths import TESTS

EARLIER = TESTS / "data" / "runs_before_rooms"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["done", "half"])
def test_a_runs_checkpoint_is_written_back_as_an_earlier_version_wrote_it(
    kind: str, tmp_path: Path
) -> None:
    earlier = EARLIER / kind / "state"
    record_bytes = json.loads((earlier / "latest.json").read_text())["record_bytes"]
    save_state(load_state(earlier), tmp_path, record_bytes)
    assert content(tmp_path) == content(earlier)


def test_a_trainings_checkpoint_has_the_bytes_of_its_format_and_reads_back(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def some(*names: str) -> dict[str, torch.Tensor]:
        return {name: torch.randn(3, 2, generator=generator) for name in names}

    state = LearningState(
        step=12,
        network=some("b", "a"),
        adam={**some("a/exp_avg"), "a/step": torch.tensor(12.0)},
        chains=some("m/left", "m/right"),
        best={},
        best_step=8,
        best_loss=0.1,
    )
    write_checkpoint(checkpoint_of(state, {"steps.jsonl": 7}, inputs={"model": "f"}), tmp_path)
    groups = {"network": state.network, "adam": state.adam, "chains": state.chains}
    payload = save(
        {f"{group}|{name}": groups[group][name] for group in groups for name in groups[group]},
        metadata={
            "editkit": '{"step": 12, "best_step": 8, "best_loss": 0.1, "inputs": {"model": "f"}}'
        },
    )
    digest = hashlib.sha256(payload).hexdigest()
    pointer = (
        f'{{\n "file": "step-00000012.safetensors",\n "sha256": "{digest}",\n "step": 12,\n'
        ' "record_bytes": {\n  "steps.jsonl": 7\n }\n}'
    )
    assert content(tmp_path) == {
        "step-00000012.safetensors": payload,
        "latest.json": pointer.encode(),
    }
    saved = read_checkpoint(tmp_path)
    assert saved is not None and saved.inputs == {"model": "f"}
    again = learning_state(saved)
    assert (again.step, again.best_step, again.best_loss) == (12, 8, 0.1)
    for group, tensors in groups.items():
        assert getattr(again, group).keys() == tensors.keys()
        assert all(torch.equal(getattr(again, group)[name], tensors[name]) for name in tensors)
    assert again.best == {}


def checkpoint(step: int, **groups: Any) -> Checkpoint:
    return Checkpoint(step=step, groups=groups, facts={}, record_bytes={})


def test_tensors_that_share_memory_are_written_each_and_read_tensors_own_theirs(
    tmp_path: Path,
) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    parts = {"whole": whole, "row": whole[1], "turned": whole.T, "none": whole[:0]}
    write_checkpoint(checkpoint(1, a=parts, b={"again": whole}), tmp_path)
    assert torch.equal(whole, torch.arange(12.0).reshape(3, 4))
    saved = read_checkpoint(tmp_path)
    assert saved is not None
    assert torch.equal(saved.groups["b"]["again"], whole)
    assert all(torch.equal(saved.groups["a"][name], tensor) for name, tensor in parts.items())
    tensors = [*saved.groups["a"].values(), *saved.groups["b"].values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    before = content(tmp_path)
    tensors[0].zero_()
    assert content(tmp_path) == before


def test_the_newest_and_one_earlier_checkpoint_are_kept(tmp_path: Path) -> None:
    assert read_checkpoint(tmp_path) is None
    for step in (1, 2, 10):
        write_checkpoint(checkpoint(step, a={"t": torch.zeros(step)}), tmp_path)
    names = ["latest.json", "step-00000002.safetensors", "step-00000010.safetensors"]
    assert sorted(content(tmp_path)) == names
    saved = read_checkpoint(tmp_path)
    assert saved is not None and saved.step == 10


@pytest.mark.parametrize(
    ("is_missing", "problem"), [(True, "it is missing"), (False, "it does not match its checksum")]
)
def test_a_damaged_file_is_a_corrupt_checkpoint(
    is_missing: bool, problem: str, tmp_path: Path
) -> None:
    write_checkpoint(checkpoint(3, a={"t": torch.zeros(3)}), tmp_path)
    path = tmp_path / "step-00000003.safetensors"
    path.unlink() if is_missing else path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ConfigError, match=rf"step-00000003.safetensors: corrupt .*, {problem}\."):
        read_checkpoint(tmp_path)
