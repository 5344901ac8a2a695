"""MALMEN and RLEdit: the identity at the start, the gradient in two phases, training, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.editors.malmen import Malmen
from editkit.errors import OptionError
from editkit.hypernet.abstract import Factors
from editkit.hypernet.examples import split
from editkit.hypernet.learning import LearningState
from editkit.hypernet.ridge_learner import ALONE, RidgeLearner, RidgeLearning, Trajectory
from editkit.hypernet.ridge_network import (
    RidgeNetwork,
    RidgeOptions,
    Shifts,
    new_ridge_network,
    num_bytes,
)
from editkit.hypernet.store import save_hypernetwork
from editkit.model.editable import EditableModel
from editkit.runner.checkpoint import RunState
from editkit.runner.loop import run_edits
from editkit.stats.store import Moments
from tests.editors.test_ultraedit import ultraedit
from tests.support.fakes import trajectory
from tests.support.helpers import requests, tiny_model
from tests.support.hypernets import facts, options
from tests.support.methods import noise, relative, step

MODULES = {"a": (6, 9), "b": (6, 9), "c": (9, 5)}
SEQUENCE = Trajectory(discount=0.5, memory=2, penalty=0.01)


def sizes(**changes: Any) -> RidgeOptions:
    fields = {"rank": 4, "blocks": 2, "step_size": 1e-3, "ridge": 0.5, "coefficient": "key"}
    return RidgeOptions(**fields | changes)


def malmen(path: Path | None = None, **changes: Any) -> Malmen:
    fields: dict[str, Any] = {
        "name": "malmen",
        "layers": (0, 1),
        "matrices": ("up", "down"),
        "layers_of": {},
        "mini_batch": 2,
        "hypernetwork": None if path is None else str(path),
        "network": sizes(),
        "train": options(),
    }
    return Malmen(**fields | changes)


def wild(network: RidgeNetwork, seed: int = 0, dtype: Any = torch.float32) -> RidgeNetwork:
    """Every tensor random, as after some training; statistics as they are."""
    generator = torch.Generator().manual_seed(seed)
    learned = {
        name: tensor.to(dtype) + 0.1 * torch.randn(tensor.shape, generator=generator).to(dtype)
        for name, tensor in network.learned().items()
        if name != "step_sizes"
    }
    return network.with_tensors(learned | {"step_sizes": network.tensors["step_sizes"].to(dtype)})


def features(seed: int = 0, tokens: int = 7) -> dict[str, Factors]:
    return {
        name: Factors(noise(tokens, size, seed=seed + i), noise(tokens, rows, seed=seed + 9 + i))
        for i, (name, (rows, size)) in enumerate(MODULES.items())
    }


def plan_of(model: EditableModel, editor: Any, asked: Any) -> Any:
    return editor.plan(step(model, asked, state=editor.init(model, Moments())))


def test_an_untrained_network_is_ultraedit_with_the_same_ridge_and_normalisation() -> None:
    model, asked = tiny_model("gpt2"), requests(3)
    ours = malmen(network=sizes(coefficient="normalised"))
    wanted = plan_of(model, ultraedit(matrices=("up", "down")), asked).updates
    found = plan_of(model, ours, asked).updates
    assert found.keys() == wanted.keys()
    for name, update in wanted.items():
        assert relative(found[name].dense(), update.dense().double()) < 1e-5
    # As published, each token's gradient is weighed by h . h~ instead.
    published = plan_of(model, malmen(), asked).updates
    assert relative(published[name].dense(), update.dense().double()) > 0.1


def test_values_and_updates_are_the_published_formulas() -> None:
    factors = features()
    network = wild(new_ridge_network(MODULES, sizes(), seed=0), dtype=torch.float64)
    network = network.observed(factors)
    t = network.tensors
    for place, name in enumerate(("a", "b")):
        h, g = factors[name].inputs_NI, factors[name].gradients_NO
        both = torch.cat(
            [torch.cat([f.inputs_NI, f.gradients_NO], 1) for f in (factors["a"], factors["b"])]
        )
        x = (torch.cat([h, g], 1) - both.mean(0)) / (both.std(0) + torch.finfo(torch.float32).eps)
        for k in (0, 1):
            inner = x @ t[f"6x9.v{k}"].T @ t[f"6x9.u{k}"].T + t[f"6x9.b{k}"]
            x = x + t[f"6x9.scale{k}"][place] * inner.relu() + t[f"6x9.shift{k}"][place]
        values = -t["step_sizes"][place] * (h * x[:, :9]).sum(1, keepdim=True) * x[:, 9:]
        ridge = t["log_ridges"][place].exp()
        wanted = torch.linalg.solve(h.T @ h + ridge * torch.eye(9).double(), h.T @ values).T
        assert relative(network.update(name, factors[name]).dense(), wanted) < 1e-5


def test_the_gradient_in_two_phases_is_that_of_autograd_through_everything() -> None:
    factors, seen = features(), features(seed=30)
    network = wild(new_ridge_network(MODULES, sizes(), seed=1), dtype=torch.float64).observed(seen)
    targets = {name: noise(*shape, seed=5) for name, shape in MODULES.items()}

    def loss(updates: dict[str, torch.Tensor]) -> torch.Tensor:
        parts = [(updates[name] - targets[name]).square().sum().sqrt() for name in MODULES]
        return torch.stack(parts).sum() ** 2

    leaves = {name: tensor.detach().clone() for name, tensor in network.learned().items()}
    plain = network.with_tensors({n: leaf.requires_grad_() for n, leaf in leaves.items()})
    updates = {
        name: plain.values(name, own).T @ plain.rights(name, own) for name, own in factors.items()
    }
    (loss(updates) + 0.3 * sum(u.square().sum() for u in updates.values())).backward()

    ours = network.with_tensors(
        {n: tensor.detach().clone().requires_grad_() for n, tensor in network.learned().items()}
    )
    shifts = Shifts.of(ours, factors)
    products = {name: shifts.values_TO[name].T @ shifts.rights_TI[name] for name in MODULES}
    loss(products).backward()
    (0.3 * shifts.penalty()).backward()
    shifts.backward(tokens=3)
    for name, leaf in leaves.items():
        assert leaf.grad is not None and float(leaf.grad.norm()) > 0, name
        gradient = ours.tensors[name].grad
        assert gradient is not None and relative(gradient, leaf.grad) < 1e-9, name


def test_an_untrained_network_already_has_gradients_of_its_layers() -> None:
    network = new_ridge_network(MODULES, sizes(blocks=1), seed=0).observed(features(seed=30))
    for tensor in network.learned().values():
        tensor.requires_grad_()
    shifts = Shifts.of(network, features())
    shifts.penalty().backward()
    shifts.backward()
    gradient = network.tensors["6x9.u0"].grad
    assert gradient is not None and float(gradient.norm()) > 0, "relu's gradient at 0 would be 0"


def learning(model: EditableModel, chosen: Trajectory = ALONE, **changes: Any) -> RidgeLearning:
    editor = malmen(layers=(1,), matrices=("down",))
    train = options(clip=1e9, accumulate=3, lr=1e-2, **changes)
    divided = split(facts(), held_apart=2, validation=3, least=3, seed=0)
    network = new_ridge_network(editor.shapes(model), sizes(step_size=1e-2), seed=0)
    return RidgeLearning(
        model=model,
        network=network,
        split=divided,
        options=train,
        seed=0,
        checkpoint_every=1,
        trajectory=chosen,
        mini_batch=2,
    )


def test_a_trajectory_weighs_the_losses_of_earlier_batches_by_their_age() -> None:
    """Against the losses of dense updates, written into the matrix one after another."""
    model = tiny_model("gpt2")
    job = learning(model, SEQUENCE, sequence=2, locality_texts=1)
    learner = RidgeLearner(job, None)
    chosen = learner.drawn(1)
    learned = learner.learn(1)
    gradient = learner.network.tensors["step_sizes"].grad
    assert gradient is not None

    def objective(scale: float) -> float:
        """Of step sizes that are `scale` times as large; features stay as they were found."""
        total, found = None, 0.0
        (module,) = job.network.modules
        network, batches = job.network, (chosen[:3], chosen[3:])
        for number, batch in enumerate(batches):
            factors, _ = learner._features(batch, {} if total is None else {module: total})
            network = network.observed(factors)
            update = Shifts.of(network, factors).updates()[module]
            moved = scale * update + (0.0 if total is None else total)
            for age, earlier in enumerate(reversed(batches[: number + 1])):
                figures = {"edit": 0.0, "kl": 0.0}
                with torch.no_grad():
                    from editkit.hypernet.losses import losses
                    from editkit.hypernet.ridge_learner import _all, _applied

                    before = {} if total is None else {module: total}
                    both = losses(
                        model,
                        _all(model, {module: moved}),
                        earlier,
                        base=lambda before=before: _applied(model, before),
                    )
                figures = float(both.edit_B.mean() * 0.1 + both.locality_B.mean())
                found += 0.5**age * figures / 2
            found += 0.01 * float((scale * update).square().sum()) / 2
            total = update + (0.0 if total is None else total)
        return found

    slope = (objective(1.02) - objective(0.98)) / 0.04
    step_size = float(job.network.tensors["step_sizes"][0])
    assert float(gradient[0]) * step_size == pytest.approx(slope, rel=2e-2)
    assert len(learned.examples) == 6 and learned.network is not learner.network


@pytest.mark.parametrize("sequence", [1, 2])
def test_the_same_seed_gives_the_same_bits_also_from_any_checkpoint(sequence: int) -> None:
    chosen = ALONE if sequence == 1 else SEQUENCE

    def job() -> RidgeLearning:
        return learning(tiny_model("gpt2"), chosen, sequence=sequence, steps=3, validation=3)

    states = [event for event in job().run() if isinstance(event, LearningState)]
    assert states[-1].step == 3
    rest = [event for event in job().run(states[1]) if isinstance(event, LearningState)]
    for name, tensor in states[-1].network.items():
        assert torch.equal(rest[-1].network[name], tensor), name
    assert not torch.equal(states[-1].network["step_sizes"], states[0].network["step_sizes"])


def saved(model: EditableModel, folder: Path) -> Path:
    editor, path = malmen(), folder / "hypernetwork.safetensors"
    network = wild(new_ridge_network(editor.shapes(model), sizes(), seed=0))
    factors = {
        name: Factors(torch.randn(9, shape[1]), torch.randn(9, shape[0]))
        for name, shape in network.shapes.items()
    }
    save_hypernetwork(
        path,
        network.observed(factors),
        model=model.name,
        fingerprint=model.fingerprint,
        dataset="d",
        trained=(),
        facts={"editor": "malmen"},
    )
    return path


def test_a_run_with_a_network_resumes_to_the_bits_of_a_whole_one(tmp_path: Path) -> None:
    path = saved(tiny_model("gpt2"), tmp_path)

    def job() -> Any:
        asked = [replace(each, id=f"m/{index}") for index, each in enumerate(requests(6))]
        return trajectory(tiny_model("gpt2"), asked, editor=malmen(path), batch_size=2)

    states = [event for event in run_edits(job()) if isinstance(event, RunState)]
    assert float(states[0].editor["32x128.inputs.count"]) == 18, "statistics go on from training"
    rest = list(run_edits(job(), RunState.from_checkpoint(states[1].checkpoint({}))))
    last = next(event for event in reversed(rest) if isinstance(event, RunState))
    for name, total in states[-1].totals.items():
        assert torch.equal(last.totals[name].dense(), total.dense())
    for name, tensor in states[-1].editor.items():
        assert torch.equal(last.editor[name], tensor), name


def test_a_file_of_another_editor_is_refused(tmp_path: Path) -> None:
    from tests.support.hypernets import saved as saved_mend

    (tmp_path / "mend").mkdir()
    other = saved_mend(tiny_model("gpt2"), tmp_path / "mend")
    assert "is the network of another editor (got 'mend'; expected malmen)" in " ".join(
        malmen(other).lacks()
    )
    assert malmen().lacks() == [], "no network is needed"


def test_sizes_are_counted_and_wrong_options_are_reported_together() -> None:
    network = new_ridge_network(MODULES, sizes(), seed=0)
    wanted = sum(tensor.nbytes for tensor in network.tensors.values())
    assert num_bytes(tuple(MODULES.values()), sizes()) == wanted
    with pytest.raises(OptionError) as raised:
        malmen(layers=(), matrices=("up", "up"), mini_batch=0)
    for key in ("layers:", "matrices:", "mini_batch:"):
        assert key in str(raised.value)
    with pytest.raises(OptionError) as raised:
        Trajectory(discount=0.0, memory=0, penalty=-1.0)
    assert len(raised.value.problems) == 3
    with pytest.raises(OptionError) as raised:
        sizes(rank=0, blocks=0, step_size=0.0, ridge=-1.0)
    assert len(raised.value.problems) == 4
