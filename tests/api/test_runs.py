"""`editkit.run`, `load_run`, `load_runs` and `export`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import editkit
from editkit.api.composing import override
from editkit.config.compose import compose, conf_folder

QUICK: dict[str, Any] = {"suite": "none", "tracker": "none", "edits": 2, "milestones": [0, 2]}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_a_run_returns_its_records_and_changes_no_global_state(tmp_path: Path) -> None:
    editkit.load("tiny-gpt2")  # torch sets a variable of its own at transformers' first import
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    before = dict(os.environ), list(sys.argv), list(sys.path)
    run = editkit.run("editor.covariance=null", **QUICK)
    assert run.status == "done"
    assert [step.step for step in run.steps] == [0, 1, 2]
    assert run.folder.is_relative_to("outputs")
    assert before == (dict(os.environ), list(sys.argv), list(sys.path))
    assert torch.equal(state, torch.random.get_rng_state())
    assert threads == torch.get_num_threads()
    assert editkit.run("editor.covariance=null", **QUICK).steps == run.steps  # done already
    loaded = editkit.load_run(str(run.folder))
    assert (loaded.steps, loaded.status) == (run.steps, "done")
    assert [other.folder for other in editkit.load_runs("outputs")] == [run.folder]
    editkit.export(run, tmp_path / "model")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    model = editkit.load("tiny-gpt2").network.state_dict()
    changed = {name for name in model if not exported[name].equal(model[name])}
    assert changed == {"transformer.h.0.mlp.c_proj.weight"}


def test_a_collapsed_run_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def propose(self: object, step: editkit.Step, module: str, plan: object) -> torch.Tensor:
        return torch.full(step.model.weight(module).shape, torch.nan)

    monkeypatch.setattr(editkit.Rome, "propose", propose)
    run = editkit.run("editor.covariance=null", **QUICK)
    assert run.status == "failed"
    assert run.failure is not None and run.failure["kind"] == "collapse"


@pytest.mark.parametrize(
    ("overrides", "settings", "problem"),
    [
        (("editor.kees=1",), {}, "editor.kees is not|editor.kees"),
        (("editor=roma",), {}, "roma"),
        ((), {"edits": 0}, "edits: .*got 0"),
        ((), {"edits": "many"}, "edits"),
        (("seed=0,1",), {}, "seed|sweep"),
        (("sweep=restraints",), {}, "sweep: a sweep is more than one run"),
        (("no equals sign",), {}, "no equals sign"),
    ],
)
def test_invalid_input_is_a_config_error(
    overrides: tuple[str, ...], settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(editkit.ConfigError, match=problem):
        editkit.run(*overrides, **settings)


def test_a_run_can_be_started_inside_an_application_of_hydra() -> None:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3"):
        own = GlobalHydra.instance().hydra
        with pytest.raises(editkit.ConfigError):
            editkit.run(edits=0)
        assert editkit.Session(editkit.load("tiny-gpt2"), options={"covariance": None}).modules
        assert GlobalHydra.instance().hydra is own
    assert GlobalHydra.instance().hydra is None


@pytest.mark.parametrize(
    "value",
    [
        *("plain", "prune/figure2", "with space", "it's", 'say "x"', "a=b,c", "x\\y", ""),
        *("null", "True", "1", "1e3", "inf"),
        *(3, -2, 1e-9, None, True, [1, "a b", None], {"a": 1}),
    ],
)
def test_values_reach_the_configuration_as_they_are(value: object) -> None:
    line = override("+value", value)
    assert compose([line]).config["value"] == value
