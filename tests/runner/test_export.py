"""The exported folder holds the edited weights, bit for bit, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from editkit.errors import ConfigError
from editkit.linalg.lowrank import LowRank
from editkit.linalg.spectral import extreme_singular_values
from editkit.model.editable import EditableModel
from editkit.model.load import ModelConfig
from editkit.restraints.prune import Prune
from editkit.runner.checkpoint import RunState, generator_states, load_state, save_state
from editkit.runner.export import export
from editkit.runner.measure import corrections
from tests.support.helpers import KINDS, Kind, tiny_model
from tests.support.records import write_run

PRUNE = {
    "function": "linear",
    "alpha": 2.0,
    "apply_at": "evaluation",
    "every": None,
    "allow_amplify": False,
}


def edited_run(
    folder: Path, *, kind: Kind = "llama", prune: Mapping[str, object] = PRUNE
) -> tuple[Path, EditableModel]:
    """A run's folder after two large edits of two matrices, and its model."""
    base = folder / "base"
    original = tiny_model(kind)
    original.network.save_pretrained(base)
    original.tokenizer.save_pretrained(base)
    model = ModelConfig(id=str(base)).load("cpu")
    modules = [model.family.down_projection(layer) for layer in (0, 2)]
    model.edit(modules)
    spectra = {module: extreme_singular_values(model.weight(module), None) for module in modules}
    generator = torch.Generator().manual_seed(0)
    for module in modules * 2:
        rows, columns = model.weight(module).shape
        model.apply(
            module,
            LowRank(
                torch.randn(rows, 1, generator=generator),
                torch.randn(columns, 1, generator=generator),
            ),
        )
    state = RunState(
        step=2,
        totals=model.totals(),
        contexts=("{}",),
        editor={},
        solve={},
        baselines={},
        spectra=spectra,
        base_sigma_max={module: spectrum.sigma_max for module, spectrum in spectra.items()},
        rng=generator_states(),
    )
    run = write_run(folder / "run")
    save_state(state, run / "state", {})
    restraint = {"prune": {"_target_": "editkit.restraints.prune.Prune", **prune}}
    (run / "config.yaml").write_text(
        yaml.safe_dump({"model": {"id": str(base)}, "restraint": restraint})
    )
    (run / "provenance.json").write_text(json.dumps({"model": {"fingerprint": model.fingerprint}}))
    return run, model


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """What a person gets who knows nothing of editkit."""
    from transformers import AutoModelForCausalLM

    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def assert_same_bits(
    exported: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    assert exported.keys() == expected.keys()
    assert [name for name in exported if not torch.equal(exported[name], expected[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_has_the_weights_that_the_run_ended_with(tmp_path: Path, kind: Kind):
    from transformers import AutoTokenizer

    run, model = edited_run(tmp_path, kind=kind)
    export(run, tmp_path / "out" / "model")
    assert_same_bits(weights_in(tmp_path / "out" / "model"), model.network.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert (
        tokenizer("The capital of France").input_ids
        == model.tokenizer("The capital of France").input_ids
    )
    (weights,) = (tmp_path / "out" / "model").glob("*.safetensors")
    config = tmp_path / "out" / "model" / "config.json"
    assert weights.stat().st_mode == config.stat().st_mode  # readable for a group, as any file
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        "model"
    ]  # nothing temporary is left


def test_an_exported_view_has_the_restrained_weights(tmp_path: Path):
    run, model = edited_run(tmp_path)
    export(run, tmp_path / "plain", view="unrestrained")
    export(run, tmp_path / "pruned", view="prune")
    base_sigma_max = {
        module: extreme_singular_values(model.base(module), None).sigma_max
        for module in model.edited_modules
    }
    assert_same_bits(weights_in(tmp_path / "plain"), model.network.state_dict())
    with model.temporarily(corrections(Prune(**PRUNE), model.totals(), base_sigma_max)):
        pruned = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    assert_same_bits(weights_in(tmp_path / "pruned"), pruned)
    assert not torch.equal(
        pruned[f"{model.edited_modules[0]}.weight"],
        model.network.state_dict()[f"{model.edited_modules[0]}.weight"],
    )


def test_a_restraint_that_acted_in_the_run_is_not_applied_again(tmp_path: Path):
    run, model = edited_run(tmp_path, prune={**PRUNE, "apply_at": "every", "every": 1})
    export(run, tmp_path / "out", view="prune")
    assert_same_bits(weights_in(tmp_path / "out"), model.network.state_dict())


def test_a_restraint_that_acted_at_the_end_has_a_model_before_and_after_it(tmp_path: Path):
    run, model = edited_run(tmp_path, prune={**PRUNE, "apply_at": "end"})
    unrestrained = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    state = replace(load_state(run / "state"), inputs={"model": model.fingerprint})
    save_state(state, run / "state", {})
    export(run, tmp_path / "would-be", view="prune")  # the run has not come to its end
    for module, correction in corrections(
        Prune(**PRUNE), state.totals, state.base_sigma_max
    ).items():
        model.apply(module, correction)
    save_state(replace(state, totals=model.totals(), before_end=state.totals), run / "state", {})
    export(run, tmp_path / "plain", view="unrestrained")
    export(run, tmp_path / "pruned", view="prune")
    export(run, tmp_path / "left")
    assert_same_bits(weights_in(tmp_path / "plain"), unrestrained)
    for name in ("would-be", "pruned", "left"):
        assert_same_bits(weights_in(tmp_path / name), model.network.state_dict())


def test_an_exported_folder_says_where_it_comes_from_and_is_a_model_to_edit(tmp_path: Path):
    run, model = edited_run(tmp_path)
    (tmp_path / "out").mkdir()  # an empty folder may be there
    export(run, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "editkit.json").read_text())["step"] == 2
    again = ModelConfig(id=str(tmp_path / "out")).load("cpu")
    assert torch.equal(again.weight(model.edited_modules[0]), model.weight(model.edited_modules[0]))


def fill_target(run: Path, to: Path) -> None:
    to.mkdir()
    (to / "thesis.tex").touch()


def change_base(run: Path, to: Path) -> None:
    tiny_model("llama", seed=1).network.save_pretrained(run.parent / "base")


def remove_base(run: Path, to: Path) -> None:
    (run.parent / "base").rename(run.parent / "elsewhere")


def remove_checkpoint(run: Path, to: Path) -> None:
    (run / "state" / "latest.json").unlink()


def damage_checkpoint(run: Path, to: Path) -> None:
    (file,) = (run / "state").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")


def leave_out_what_was_before_the_end(run: Path, to: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["restraint"]["prune"]["apply_at"] = "end"
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def restrain_in_the_loop(run: Path, to: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["restraint"]["prune"] |= {"apply_at": "every", "every": 1}
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def remove_config(run: Path, to: Path) -> None:
    (run / "config.yaml").unlink()


@pytest.mark.parametrize(
    ("spoil", "view", "message"),
    [
        (fill_target, None, r"--to: .*out exists and is not empty"),
        (
            lambda run, to: None,
            "rect",
            r"--view: .* \(got 'rect'; expected one of unrestrained, prune\)\.",
        ),
        (change_base, None, r"model\.id: this is not the model that was edited"),
        (remove_base, None, r"model\.id: the folder does not exist"),
        (remove_checkpoint, None, r"state: no checkpoint, the run has not saved its state yet\."),
        (damage_checkpoint, None, "does not match its checksum"),
        (
            leave_out_what_was_before_the_end,
            "unrestrained",
            r"earlier version of editkit, .* before prune acted at the end\. Fix: export without",
        ),
        (
            restrain_in_the_loop,
            "unrestrained",
            r"--view: .* \(got 'unrestrained'; expected one of prune\)\.",
        ),
        (remove_config, None, r"run: model: not a mapping \(got None;"),
    ],
)
def test_what_cannot_be_exported_is_one_clear_error_and_leaves_no_folder(
    tmp_path: Path, spoil: Callable[[Path, Path], None], view: str | None, message: str
):
    run, _ = edited_run(tmp_path)
    spoil(run, tmp_path / "out")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message):
        export(run, tmp_path / "out", view=view)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
