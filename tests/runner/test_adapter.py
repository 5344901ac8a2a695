"""The edits of a run as an adapter for peft, and as factors."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from editkit.api.exported import load_edited
from editkit.config.build import build
from editkit.config.compose import compose
from editkit.errors import ConfigError
from editkit.model.load import ModelConfig
from editkit.runner.adapter import DELTA, SERVED_RANKS
from editkit.runner.checkpoint import load_state
from editkit.runner.export import export
from editkit.runner.session import run as run_experiment
from editkit.runner.step import attach
from tests.runner.test_export import edited_run
from tests.support.helpers import KINDS, Kind
from tests.support.sessions import run_folder

IDS = torch.tensor([[3, 7, 1, 9, 4]])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own call
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_and_merges_the_adapter_to_the_logits_of_the_edited_model(
    tmp_path: Path, kind: Kind
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: the extra 'peft'")
    from transformers import AutoModelForCausalLM

    run, model = edited_run(tmp_path, kind=kind)
    errors = export(run, tmp_path / "lora", form="lora")
    assert set(errors) == set(model.edited_modules) and max(errors.values()) < 1e-6
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        expected, unedited = model.network(IDS).logits, base(IDS).logits
        adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))
        beside = adapted(IDS).logits
        merged = adapted.merge_and_unload()(IDS).logits
    scale = expected.abs().max()
    assert (unedited - expected).abs().max() > 1e-2 * scale
    assert (beside - expected).abs().max() < 1e-5 * scale
    assert (merged - expected).abs().max() < 1e-5 * scale


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own call
@pytest.mark.parametrize("editor", [pytest.param("lora", marks=pytest.mark.slow), "adalora"])
def test_an_adapter_beside_the_weights_is_loaded_by_peft_and_by_load_edited(
    tmp_path: Path, editor: str
) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: the extra 'peft'")
    choices = (f"editor={editor}", "editor.steps=5", "editor.lr=0.005", "model=tiny-gpt2")
    few = ("edits=2", "milestones=[2]", "suite=none", "tracker=none")
    experiment = build(compose([*choices, *few, f"paths.outputs={tmp_path / 'runs'}"]).config)
    assert run_experiment(experiment) == 0
    run, model = run_folder(tmp_path / "runs"), ModelConfig(id="asset:tiny-gpt2").load("cpu")
    base = copy.deepcopy(model.network)
    attach(model, experiment.editor, load_state(run / "state").editor)
    export(run, tmp_path / "lora", form="lora")
    export(run, tmp_path / "whole")
    with torch.no_grad():
        expected, unedited = model.network(IDS).logits, base(IDS).logits
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "lora"))(IDS).logits
        ours = load_edited(tmp_path / "whole")(IDS).logits
    assert (unedited - expected).abs().max() > 1e-2
    assert torch.allclose(theirs, expected, atol=1e-4)
    assert torch.equal(ours, expected)


def test_an_adapter_keeps_the_rules_of_a_server(tmp_path: Path) -> None:
    run, model = edited_run(tmp_path)
    export(run, tmp_path / "lora", form="lora")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8 and config["r"] in SERVED_RANKS
    assert config["bias"] == "none" and set(config["target_modules"]) == set(model.edited_modules)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for module in model.edited_modules:
        rows, columns = model.weight(module).shape
        names = [f"base_model.model.{module}.lora_{part}.weight" for part in "AB"]
        assert [tuple(tensors.pop(name).shape) for name in names] == [(8, columns), (rows, 8)]
    assert not tensors  # a server refuses whole matrices and biases
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "library_name: peft" in card and f"| `{model.edited_modules[0]}` | 2 |" in card


def test_a_truncated_adapter_tells_its_error(tmp_path: Path) -> None:
    run, model = edited_run(tmp_path)
    errors = export(run, tmp_path / "delta", form="delta", rank=1)
    tensors = load_file(tmp_path / "delta" / DELTA)
    for module in model.edited_modules:
        kept = tensors[f"{module}.left"] @ tensors[f"{module}.right"].T
        total = model.total(module).dense()
        assert tensors[f"{module}.left"].shape[1] == 1
        exact = torch.linalg.vector_norm(total - kept) / torch.linalg.vector_norm(total)
        assert errors[module] == pytest.approx(float(exact), rel=1e-4) and errors[module] > 0.1
        assert (
            f"| `{module}` | 1 | {errors[module]:.2g} |"
            in (tmp_path / "delta" / "README.md").read_text()
        )


def test_the_factors_are_those_of_the_view(tmp_path: Path) -> None:
    run, model = edited_run(tmp_path)
    export(run, tmp_path / "whole", form="delta")
    export(run, tmp_path / "pruned", form="delta", view="prune")
    whole, pruned = (load_file(tmp_path / name / DELTA) for name in ("whole", "pruned"))
    module = model.edited_modules[0]
    dense = whole[f"{module}.left"] @ whole[f"{module}.right"].T
    assert torch.allclose(dense, model.total(module).dense(), atol=1e-5)
    restrained = pruned[f"{module}.left"] @ pruned[f"{module}.right"].T
    assert torch.linalg.matrix_norm(restrained, 2) < 0.9 * torch.linalg.matrix_norm(dense, 2)
    with safe_open(tmp_path / "pruned" / DELTA, "pt") as file:
        assert file.metadata()["base"] == str(tmp_path / "base")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"form": "gguf"}, r"--as: unknown form \(got 'gguf'; expected one of model, lora, delta"),
        ({"rank": 4}, r"--rank: cannot be used here \(got 4; expected 1 or more, with --as lora"),
        ({"form": "lora", "rank": 0}, r"--rank: cannot be used here \(got 0;"),
        ({"form": "lora", "rank": 10**6}, r"--rank: larger than the matrix \(got 1000000;"),
    ],
)
def test_what_cannot_be_written_is_one_clear_error_and_leaves_no_folder(
    tmp_path: Path, options: dict[str, object], expected: str
) -> None:
    run, _ = edited_run(tmp_path)
    with pytest.raises(ConfigError, match=expected):
        export(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
