"""What must fit before a model is loaded: MEND and its training, the host beside a GPU, validate;
and how weights and answers arrive.
"""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.config.build import build, memory_demand
from editkit.config.compose import compose
from editkit.editors.mend import Mend
from editkit.errors import ConfigError
from editkit.hypernet.abstract import STEP_SIZES
from editkit.hypernet.learner import MendLearner
from editkit.hypernet.learning import LearningState
from editkit.hypernet.network import new_hypernetwork, num_bytes
from editkit.model import hub
from editkit.model.families import Outline
from editkit.model.load import ModelConfig
from editkit.resources import estimate as memory
from editkit.resources.estimate import Estimate, edited, estimated, require_fit
from editkit.resources.footprint import Demand
from editkit.restraints.prune import Prune
from editkit.runner import session
from editkit.training.build import build_training
from editkit.training.session import train
from tests.support.helpers import KINDS, Kind, tiny_model
from tests.support.hypernets import learning, network_options

MATRIX = 4096 * 14336  # of Llama 3 8B


def composed(*overrides: str) -> dict[str, Any]:
    return compose(list(overrides)).config


def demand(*overrides: str) -> Demand:
    composed = compose(list(overrides))
    return memory_demand(composed.config, choices=composed.choices)


def of_training(asked: Demand) -> Estimate | None:
    assert isinstance(asked.editor, Mend)
    return estimated(asked, training=asked.editor)


def test_mend_is_counted_with_every_matrix_it_edits_and_its_hypernetwork() -> None:
    found = estimated(
        demand("model=llama3-8b", "editor=mend", "runtime=gpu24", "model.dtype=bfloat16", "edits=1")
    )
    assert found is not None
    both = 4096 + 14336
    assert found.on_device.masters == 9 * (2 * 4 * MATRIX + 15 * both * 4), (
        "the total twice, and an edit's fifteen columns"
    )
    assert found.on_host.masters == 9 * MATRIX * 2, "W_0"
    network = 2 * 4 * 2 * 2 * 1920 * both  # two shapes, two layers, U and V
    assert network < found.on_device.hypernetwork < 1.01 * network
    assert "hypernetwork 1.1" in str(found.on_device) and not found.fits


def test_the_matrices_are_the_editors_own() -> None:
    assert edited(demand("model=tiny-llama", "editor=mend")) == tuple(
        f"model.layers.{layer}.mlp.{name}_proj"
        for layer in compose(["model=tiny-llama", "editor=mend"]).config["editor"]["layers"]
        for name in ("gate", "up", "down")
    )
    with pytest.raises(
        ConfigError, match=r"editor.layers: llama3-8b .*got \[32\]; expected layers 0 to 31"
    ):
        estimated(demand("model=llama3-8b", "editor=rome", "editor.layers=[32]"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_outline_names_the_matrices_of_the_loaded_model(kind: Kind) -> None:
    model = tiny_model(kind)
    outline = Outline(name=model.name, family=model.family, num_layers=model.num_layers)
    assert outline.mlp_matrices((0, 1)) == model.mlp_matrices((0, 1))
    assert outline.down_projections((1,)) == model.down_projections((1,))


def test_a_hypernetworks_bytes_are_those_of_its_tensors() -> None:
    shapes = {"a.up": (12, 8), "a.down": (8, 12), "b.up": (12, 8), "b.down": (8, 12), "c": (5, 3)}
    for rank in (4, 1000):
        made = new_hypernetwork(shapes, network_options(rank=rank), seed=0)
        assert num_bytes(list(shapes.values()), made.options) == sum(
            tensor.nbytes for tensor in made.tensors.values()
        )


def test_a_training_holds_the_network_its_gradient_and_two_moments() -> None:
    chosen = ("model=llama3-8b", "editor=mend", "runtime=gpu48", "model.dtype=bfloat16")
    run, training = estimated(demand(*chosen)), of_training(demand(*chosen))
    assert run is not None and training is not None
    assert training.on_device.hypernetwork == 4 * run.on_device.hypernetwork
    assert training.on_device.masters == training.on_device.statistics == 0
    assert training.on_host.hypernetwork == 2 * run.on_device.hypernetwork, "the first and the best"
    on_cpu = of_training(demand("model=gpt2", "editor=mend"))
    assert on_cpu is not None and on_cpu.phases["checkpoint"] - 0.1e9 == pytest.approx(
        on_cpu.on_device.hypernetwork / 2
    )


def training_of(folder: Path, *overrides: str) -> Any:
    small = (
        "editor.train.steps=1",
        "editor.train.validation=4",
        "tracker=none",
        f"paths.outputs={folder}",
    )
    return build_training(composed("model=tiny-gpt2", "editor=mend", *small, *overrides))


def test_a_training_that_does_not_fit_is_refused_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelConfig, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(
        ConfigError, match=r"cpu has 0.1 GB, the run would take about .*hypernetwork"
    ):
        train(training_of(tmp_path, "runtime.memory_gb=0.1"))


def test_an_infinite_step_size_is_a_mistake() -> None:
    with pytest.raises(
        ConfigError,
        match=r"editor.network.step_size: invalid value \(got inf; expected a finite number\)",
    ):
        estimated(demand("editor=mend", "editor.network.step_size=inf"))


def test_no_state_is_copied_but_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    state = MendLearner.state
    monkeypatch.setattr(MendLearner, "state", lambda self: taken.append(self.step) or state(self))
    job = learning(tiny_model("gpt2"), steps=5, validate_every=5)
    object.__setattr__(job, "checkpoint_every", 100)
    assert (
        [event.step for event in job.run() if isinstance(event, LearningState)] == taken == [0, 5]
    )


@pytest.mark.parametrize("step", [2, 3])  # within a chain, and where a new one begins
def test_a_refused_step_leaves_no_trace(step: int) -> None:
    learner = MendLearner(learning(tiny_model("gpt2"), sequence=2), None)
    for _ in range(step - 1):
        learner.take_step()
    with torch.no_grad():
        learner.network.tensors[STEP_SIZES].fill_(1e38)
    before = learner.state()
    assert learner.take_step().nonfinite
    after = learner.state()
    for group in ("network", "adam", "chains"):
        former, now = getattr(before, group), getattr(after, group)
        assert former.keys() == now.keys() and all(
            torch.equal(former[name], now[name]) for name in former
        ), group
    assert (before.step, bool(before.chains)) == (after.step, True)


def test_a_state_is_the_learners_no_more() -> None:
    learner = MendLearner(learning(tiny_model("gpt2")), None)
    state = learner.state()
    former = {name: tensor.clone() for name, tensor in state.network.items()}
    learner.take_step()
    assert all(torch.equal(tensor, state.network[name]) for name, tensor in former.items())
    assert not state.outcome().network and state.outcome().step == state.step


def test_the_host_beside_a_gpu_is_a_limit_where_the_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = demand("model=gpt2-xl", "editor=memit", "runtime=gpu24")
    monkeypatch.setattr(memory, "available", lambda: 3e9)
    assert require_fit(config) is not None, "this machine is not where it will run"
    with pytest.raises(ConfigError) as caught:
        require_fit(config, free_bytes=24e9)
    (problem,) = caught.value.problems
    assert (
        "beside cuda the host has 3 GB free, the run would keep about" in problem
        and "runtime.statistics=disk" in problem
    )
    monkeypatch.setattr(memory, "available", lambda: 30e9)
    found = require_fit(config, free_bytes=24e9)
    assert found is not None and found.on_host.weights == 0 and "30 GB there" in found.rows()[-1][1]


def test_weights_go_straight_to_a_gpu_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    plain = ModelConfig(id="asset:tiny-llama").load()
    real, asked = AutoModelForCausalLM.from_pretrained, []

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["device_map"])
        return real(*args, **kwargs | {"device_map": {"": "cpu"}})

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", on_cpu)
    monkeypatch.setattr("editkit.model.load.require_device", lambda device: None)
    placed = ModelConfig(id="asset:tiny-llama").load("cuda:1")
    assert asked == [{"": torch.device("cuda:1")}]
    assert placed.fingerprint == plain.fingerprint
    assert not any(hasattr(module, "_hf_hook") for module in placed.network.modules()), (
        "nothing is fetched when it is needed"
    )


def test_validate_refuses_what_the_run_would_refuse_and_not_a_gpu_of_another_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from typer.testing import CliRunner

    from editkit.cli.main import app

    def validate(*overrides: str) -> Any:
        return CliRunner().invoke(app, ["validate", "edits=3", *overrides])

    refused = validate("runtime.memory_gb=0.1")
    assert isinstance(refused.exception, ConfigError) and "cpu has 0.1 GB" in str(
        refused.exception
    ), "exit code 2, as tests/cli/test_cli.py"
    monkeypatch.setattr(memory, "available", lambda: 1e6)
    monkeypatch.setattr(memory, "free_bytes", lambda config: None)
    assert validate("runtime=cuda").exit_code == 0


def test_a_restraint_is_refused_before_second_moments_are_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = build(
        composed(
            "edits=2", "restraint=prune", "tracker=none", "suite=none", f"paths.outputs={tmp_path}"
        )
    )
    monkeypatch.setattr(
        Prune, "check", lambda self, base_sigma_max: [f"alpha: {len(base_sigma_max)} matrices"]
    )
    monkeypatch.setattr(session, "build_moments", lambda *_, **__: pytest.fail("collected"))
    with pytest.raises(ConfigError, match=r"restraint.prune.alpha: 1 matrices"):
        session.prepare(experiment, should_stop=lambda: False)


def test_only_a_name_without_an_address_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def answering(errno: int) -> Any:
        def lookup(*_: Any) -> Any:
            raise socket.gaierror(errno, "no")

        return lookup

    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    for errno, expected in ((socket.EAI_NONAME, True), (socket.EAI_AGAIN, False)):
        monkeypatch.setattr(socket, "getaddrinfo", answering(errno))
        assert hub.is_unreachable() is expected
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    assert not hub.is_unreachable()
    monkeypatch.setattr(socket, "getaddrinfo", answering(socket.EAI_NONAME))
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    assert not hub.is_unreachable(), "a proxy resolves names"


def test_a_hub_model_without_the_hub_is_refused_without_waiting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("editkit.model.load.is_unreachable", lambda: True)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    for ask in (ModelConfig(id="foo/bar").network_config, ModelConfig(id="foo/bar").load_tokenizer):
        with pytest.raises(
            ConfigError, match=r"model.id: .* cannot be loaded from .* or the hub.*got 'foo/bar'"
        ):
            ask()


def test_retries_of_the_hub_are_not_logged_but_its_other_messages_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logger = logging.getLogger(hub.LOGGERS[0])
    with caplog.at_level(logging.WARNING, logger=logger.name):
        logger.addHandler(caplog.handler)
        with hub.quietly():
            logger.warning("'no' thrown while requesting HEAD https://huggingface.co")
            logger.warning("Retrying in 1s [Retry 1/5].")
            logger.warning("Rate limited. Waiting 300s before retry [Retry 1/5].")
        logger.warning("Retrying in 2s [Retry 2/5].")
        logger.removeHandler(caplog.handler)
    assert {record.getMessage()[:12] for record in caplog.records} == {
        "Rate limited",
        "Retrying in ",
    }
