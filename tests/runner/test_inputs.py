"""A run resumes with the inputs that it began with, or reports which of them have changed and leaves
the earlier results alone.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.config.build import build
from editkit.config.compose import compose, plain
from editkit.config.experiment import Experiment
from editkit.editors.base import Step
from editkit.errors import ConfigError
from editkit.evaluation.harness.suite import Suite
from editkit.evaluation.perplexity import Perplexity
from editkit.model.files import files_digest
from editkit.model.load import ModelConfig, require_device
from editkit.model.source import Source
from editkit.runner.checkpoint import load_state, restore_generators, save_state
from editkit.runner.export import export
from editkit.runner.inputs import of_dataset, require_same
from editkit.runner.session import run
from tests.support.fakes import FakeEditor
from tests.support.helpers import tiny_model


@dataclass(frozen=True, kw_only=True)
class WithMoments(FakeEditor):
    """Asks for second moments, without use for them."""

    stops_at: str = ""  # id of a request before which the run is cut off

    @property
    def needs_moments(self) -> bool:
        return True

    def plan(self, step: Step) -> Any:
        if step.requests[0].id == self.stops_at:
            raise KeyboardInterrupt
        return super().plan(step)


SUITE = {
    "name": "s",
    "shots": None,
    "seed": 0,
    "data": None,
    "max_new_tokens": None,
    "tokens_per_batch": 4096,
    "every": 1,
}


def write_data(folder: Path, target: str = "English") -> None:
    def record(index: int) -> dict[str, Any]:
        new, old = {"str": target, "id": "Q1"}, {"str": "French", "id": "Q2"}
        rewrite = {
            "prompt": "{} speaks",
            "subject": f"Ann{index}",
            "target_new": new,
            "target_true": old,
            "relation_id": "P1",
        }
        prompts = {
            "paraphrase_prompts": [f"Ann{index} talks"],
            "neighborhood_prompts": ["Léon Blum speaks"],
        }
        return {"case_id": index, "requested_rewrite": rewrite, **prompts}

    (folder / "facts.json").write_text(json.dumps([record(index) for index in range(3)]))


def write_model(folder: Path, seed: int = 0) -> None:
    model = tiny_model("gpt2", seed=seed)
    model.network.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")


def write_text(folder: Path, text: str = "The capital of France is Paris.") -> None:
    (folder / "text.txt").write_text("\n".join([text, "Léon Blum speaks French."] * 40))


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than everything else here."""
    monkeypatch.setattr("editkit.runner.session.draw_figures", lambda folder: None)


@functools.lru_cache(maxsize=1)
def composed() -> Any:
    few = [
        "edits=3",
        "milestones=[0,3]",
        "checkpoint.every=1",
        "evaluation.protocols=[probability]",
    ]
    return plain(
        compose(
            [
                "dataset=counterfact",
                "stats=text",
                "stats.path=none",
                "suite=none",
                "tracker=none",
                *few,
            ]
        ).config
    )


def experiment(
    folder: Path, *, stops_at: str = "", resume: str = "auto", **runtime: Any
) -> Experiment:
    """Three edits of files below the folder."""
    config = copy.deepcopy(composed()) | {
        "resume": resume,
        "paths": {"outputs": str(folder / "outputs")},
    }
    config["dataset"]["path"] = str(folder / "facts.json")
    config["stats"] |= {"path": str(folder / "text.txt"), "folder": str(folder / "statistics")}
    config["runtime"] |= runtime
    return replace(
        build(config),
        model=ModelConfig(id=str(folder / "base")),
        editor=WithMoments(stops_at=stops_at),
    )


def begin(folder: Path, *, stops_at: str) -> Path:
    """Writes the inputs and runs the experiment, as far as it comes."""
    for write in (write_data, write_model, write_text):
        write(folder)
    made = experiment(folder, stops_at=stops_at)
    if stops_at:
        with pytest.raises(KeyboardInterrupt):
            run(made)
    else:
        assert run(made) == 0
    return made.folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


CHANGES: list[tuple[Callable[[Path], None], str]] = [
    (
        lambda folder: write_data(folder, "Spanish"),
        r"^dataset: .*facts\.json is not what the run began with \(got \'\w{12}\'; expected ",
    ),
    (
        lambda folder: write_model(folder, seed=1),
        r"^model: .*base is not what the run began with .* with \'\w{12}\'\)\. Fix: restore the former ",
    ),
    (
        lambda folder: write_text(folder, "Seattle."),
        r"2 problems:\n  - stats of transformer\.h\.0\.mlp\.c_proj: .*statistics is not what ",
    ),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_a_run_does_not_resume_with_other_data_weights_or_second_moments(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    folder = begin(tmp_path, stops_at="counterfact/1")
    change(tmp_path)
    before = files(folder)
    with pytest.raises(ConfigError, match=message):
        run(experiment(tmp_path))
    assert files(folder) == before


def test_a_run_whose_inputs_are_the_same_resumes(tmp_path: Path) -> None:
    folder = begin(tmp_path, stops_at="counterfact/1")
    for write in (write_data, write_model, write_text):
        write(tmp_path)
    assert run(experiment(tmp_path)) == 0
    assert sorted(load_state(folder / "state").inputs) == [
        "dataset",
        "model",
        *(f"stats of transformer.h.{n}.mlp.c_proj" for n in (0, 1)),
    ]


def test_a_checkpoint_without_the_inputs_that_the_run_began_with_is_not_resumed(
    tmp_path: Path,
) -> None:
    folder = begin(tmp_path, stops_at="counterfact/1")
    sizes = json.loads((folder / "state" / "latest.json").read_text())["record_bytes"]
    save_state(replace(load_state(folder / "state"), inputs={}), folder / "state", sizes)
    with pytest.raises(
        ConfigError, match=r"dataset: the checkpoint does not record .* earlier version of editkit"
    ):
        run(experiment(tmp_path))


def test_a_finished_run_is_not_done_for_other_data(tmp_path: Path) -> None:
    folder = begin(tmp_path, stops_at="")
    assert run(experiment(tmp_path)) == 0, "done already"
    write_data(tmp_path, "Spanish")
    before = files(folder)
    with pytest.raises(ConfigError, match=r"dataset: .* is not what the run began with"):
        run(experiment(tmp_path))
    assert files(folder) == before
    assert run(experiment(tmp_path, resume="never")) == 0
    assert files(folder)["provenance.json"] != before["provenance.json"]


def test_a_finished_run_is_not_done_for_other_weights(tmp_path: Path) -> None:
    folder = begin(tmp_path, stops_at="")
    write_model(tmp_path, seed=1)
    before = files(folder)
    with pytest.raises(ConfigError, match=r"^model: .*base is not what the run began with"):
        run(experiment(tmp_path))
    assert files(folder) == before


def test_a_finished_run_is_done_for_the_same_weights_in_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path, stops_at="")
    loaded: list[str] = []
    load = ModelConfig.load
    monkeypatch.setattr(
        ModelConfig, "load", lambda self, device: loaded.append(device) or load(self, device)
    )
    assert run(experiment(tmp_path)) == 0 and not loaded, "the same files: nothing is loaded"
    network = tiny_model("gpt2").network
    (tmp_path / "base" / "model.safetensors").unlink()
    network.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert run(experiment(tmp_path)) == 0 and loaded == ["cpu"]


def test_a_finished_run_of_an_earlier_version_is_done_whatever_the_weights(tmp_path: Path) -> None:
    folder = begin(tmp_path, stops_at="")
    provenance = json.loads((folder / "provenance.json").read_text())
    assert len(provenance["model"].pop("files")) == 32
    (folder / "provenance.json").write_text(json.dumps(provenance))
    write_model(tmp_path, seed=1)
    assert run(experiment(tmp_path)) == 0


def test_of_a_large_file_the_digest_reads_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("editkit.model.files.WHOLE", 2**20)
    path, content = tmp_path / "model.safetensors", bytearray(2**21)
    digests = []
    for place in (None, 0, 2**20, 2**21 - 1):
        path.write_bytes(content if place is None else bytes(content[:place]) + b"1" * 2**13)
        with open(path, "rb+") as file:
            file.truncate(2**21)
        digests.append(files_digest([Source(str(tmp_path))]))
    assert len(set(digests)) == 4
    (tmp_path / "README.md").write_text("not read")
    assert files_digest([Source(str(tmp_path)), Source("some/hub-id")]) == digests[-1]
    assert files_digest([Source("some/hub-id")]) is None


def test_the_model_that_the_checkpoint_belongs_to_is_exported_whatever_the_provenance_says(
    tmp_path: Path,
) -> None:
    folder = begin(tmp_path, stops_at="")
    write_model(tmp_path, seed=1)
    provenance = json.loads((folder / "provenance.json").read_text())
    provenance["model"]["fingerprint"] = (
        ModelConfig(id=str(tmp_path / "base")).load("cpu").fingerprint
    )
    (folder / "provenance.json").write_text(json.dumps(provenance))
    (folder / "config.yaml").write_text(json.dumps({"model": {"id": str(tmp_path / "base")}}))
    with pytest.raises(ConfigError, match="is not the model that was edited"):
        export(folder, tmp_path / "out")


def test_starting_anew_removes_nothing_before_all_is_there_that_the_run_needs(
    tmp_path: Path,
) -> None:
    folder = begin(tmp_path, stops_at="")
    before = files(folder)
    for spoil in ({"memory_gb": 1e-6}, {"device": "cuda:9"}):
        with pytest.raises(ConfigError):
            run(experiment(tmp_path, resume="never", **spoil))
        assert files(folder) == before
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"model\.id: the folder does not exist"):
        run(experiment(tmp_path, resume="never"))
    assert files(folder) == before


def test_what_is_measured_on_is_an_input_too(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    write_text(tmp_path)
    model, suite = tiny_model("gpt2"), Suite(**SUITE, tasks=("world_entailment",), limit=2)  # type: ignore[arg-type]
    perplexity = Perplexity(path=str(text), max_tokens=None, window=16)
    before = {**perplexity.inputs(model), **suite.inputs(model)}
    assert sorted(before) == ["evaluation.perplexity.path", "suite.tasks: world_entailment"]
    write_text(tmp_path, "Seattle.")
    more = Suite(**SUITE, tasks=("world_entailment",), limit=3)  # type: ignore[arg-type]
    after = {**perplexity.inputs(model), **more.inputs(model)}
    assert all(after[name] != digest for name, digest in before.items())
    assert Suite(**SUITE, tasks=("world_entailment",), limit=2).inputs(model) == suite.inputs(model)  # type: ignore[arg-type]
    other = {"digest": "1", "variant": {"snippets": "2"}}
    with pytest.raises(ConfigError, match=r"dataset\.snippets: facts\.json is not what"):
        require_same(
            of_dataset(other),
            of_dataset(other | {"variant": {"snippets": "3"}}),
            source="facts.json",
        )


def test_a_run_that_is_resumed_elsewhere_records_where_it_was_before(tmp_path: Path) -> None:
    folder = begin(tmp_path, stops_at="counterfact/1")
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["earlier_sessions"] == []
    (folder / "provenance.json").write_text(json.dumps(provenance | {"device": "abacus"}))
    assert run(experiment(tmp_path)) == 0
    assert json.loads((folder / "provenance.json").read_text())["earlier_sessions"] == [
        {"device": "abacus"}
    ]


def test_generators_of_gpus_that_are_not_there_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    restored = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append(device))
    state = torch.random.get_rng_state()
    restore_generators({"cpu": state, "cuda:0": state, "cuda:1": state})
    assert restored == ["cuda:0"]


@pytest.mark.parametrize("device", ["cuda:9", "mps"])
def test_a_missing_device_is_reported_with_those_that_exist(device: str) -> None:
    if device == "mps" and torch.mps.is_available():
        pytest.skip("this machine has mps, so it is not a missing device")
    with pytest.raises(
        ConfigError, match=rf"^runtime\.device: .* \(got '{device}'; expected one of cpu"
    ):
        require_device(device)


@pytest.mark.parametrize(
    "damage",
    [
        {"file": 7},
        {"sha256": None},
        {"step": "3"},
        {"record_bytes": None},
        {"record_bytes": []},
        {"record_bytes": {"steps.jsonl": "9"}},
    ],
)
def test_a_pointer_with_values_of_other_types_is_a_corrupt_checkpoint(
    damage: dict[str, Any], tmp_path: Path
) -> None:
    sound = {
        "file": "step-00000003.safetensors",
        "sha256": "0",
        "step": 3,
        "record_bytes": {"steps.jsonl": 9},
    }
    (tmp_path / "latest.json").write_text(json.dumps(sound | damage))
    with pytest.raises(ConfigError, match=r"latest\.json: corrupt checkpoint, it cannot be read"):
        load_state(tmp_path)
