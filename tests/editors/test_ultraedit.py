"""UltraEdit: the plain primal formula in float64, its statistics and traps, resuming."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from editkit.editors.ultraedit import UltraEdit
from editkit.errors import ConfigError, OptionError
from editkit.hypernet.abstract import Factors
from editkit.hypernet.features import requests_features
from editkit.hypernet.normaliser import SMALLEST, Normaliser
from editkit.linalg.recursive import Memory, ridge
from editkit.linalg.running import Running
from editkit.model.editable import EditableModel
from editkit.model.tokens import encode_with_target
from editkit.runner.checkpoint import RunState
from editkit.runner.loop import run_edits
from editkit.stats.store import Moments
from editkit.types import EditRequest, StepRecord
from tests.support.fakes import trajectory
from tests.support.families import family_model
from tests.support.helpers import KINDS, requests, tiny_model
from tests.support.methods import noise, step

BATCHES = ([0, 1, 2], [3, 4])


def ultraedit(**changes: Any) -> UltraEdit:
    options: dict[str, Any] = {
        "name": "ultraedit",
        "layers": (0, 1),
        "matrices": ("down",),
        "layers_of": {},
        "step_size": 1e-3,
        "ridge": 0.5,
        "mini_batch": 2,
        "whiten": "diagonal",
    } | changes
    return UltraEdit(**options)


def plan_of(model: EditableModel, editor: UltraEdit, asked: Any, state: Any = None) -> Any:
    given = editor.init(model, Moments()) if state is None else state
    return editor.plan(step(model, asked, state=given))


def plain_features(
    model: EditableModel, modules: tuple[str, ...], asked: list[EditRequest], at_once: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs (T, I) and output gradients (T, O) by one pass a request over all logits, float64."""
    found: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = {
        name: ([], []) for name in modules
    }
    for start in range(0, len(asked), at_once):
        texts = [
            encode_with_target(model.tokenizer, each.full_prompt, each.target)
            for each in asked[start : start + at_once]
        ]
        tokens = sum(len(text.target_ids) for text in texts)
        for text in texts:
            inputs: dict[str, torch.Tensor] = {}
            outputs: dict[str, torch.Tensor] = {}

            def keep(name: str, inputs: Any = inputs, outputs: Any = outputs) -> Any:
                def hook(_module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
                    inputs[name] = given[0].detach()
                    outputs[name] = output.requires_grad_()
                    return output

                return hook

            handles = [model.module(name).register_forward_hook(keep(name)) for name in modules]
            with torch.enable_grad():
                logits = model.network(torch.tensor([text.ids])).logits[0].log_softmax(dim=-1)
                places = torch.arange(text.start - 1, len(text.ids) - 1)
                loss = -logits[places, torch.tensor(text.target_ids)].sum() / tokens
                gradients = torch.autograd.grad(loss, [outputs[name] for name in modules])
            for handle in handles:
                handle.remove()
            for name, gradient in zip(modules, gradients, strict=True):
                found[name][0].append(inputs[name][0, places].double())
                found[name][1].append(gradient[0, places].double())
    return {name: (torch.cat(own[0]), torch.cat(own[1])) for name, own in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_the_primal_ridge_solution_over_two_batches(kind: Any) -> None:
    model = tiny_model(kind)
    matrices = ("up", "down") if kind != "llama" else ("gate", "up", "down")
    editor = ultraedit(matrices=matrices)
    modules, state = editor.modules(model), editor.init(model, Moments())
    so_far: dict[torch.Size, list[torch.Tensor]] = {}
    for batch in BATCHES:
        asked = [requests(5)[index] for index in batch]
        plan = plan_of(model, editor, asked, state)
        features, _ = requests_features(model, modules, asked, editor.mini_batch)
        for name, plain in plain_features(model, modules, asked, editor.mini_batch).items():
            own = features[name]
            for found, wanted in zip((own.inputs_NI, own.gradients_NO), plain, strict=True):
                assert float((found - wanted).norm() / wanted.norm()) < 1e-5
            both = torch.cat([own.inputs_NI, own.gradients_NO], dim=1).double()
            so_far.setdefault(model.weight(name).shape, []).append(both)
        for name, own in features.items():
            seen, inputs = torch.cat(so_far[model.weight(name).shape]), own.inputs_NI.double()
            both = torch.cat([inputs, own.gradients_NO.double()], dim=1)
            hats = (both - seen.mean(0)) / (seen.std(0) + torch.finfo(torch.float32).eps)
            size = inputs.shape[1]
            values = -1e-3 * hats[:, :size].square().sum(1, keepdim=True) * hats[:, size:]
            primal = torch.linalg.solve(
                inputs.T @ inputs + 0.5 * torch.eye(size, dtype=torch.float64), inputs.T @ values
            ).T
            update = editor.propose(step(model, asked), name, plan)
            assert update.rank == len(inputs), "one column a target token"
            assert float((update.dense().double() - primal).norm() / primal.norm()) < 1e-6
        state = editor.observe(step(model, asked), plan)


def test_the_dual_solve_is_the_primal_one() -> None:
    keys, values = noise(48, 7, seed=1), noise(12, 7, seed=2)
    primal = values @ keys.T @ torch.linalg.inv(keys @ keys.T + 0.3 * torch.eye(48).double())
    dual = Memory().solve(keys, values, ridge(0.3)).dense()
    assert float((dual - primal).norm() / primal.norm()) < 1e-12


@pytest.mark.parametrize("sizes", [(40,), (1,) * 40, (1, 1, 20, 3, 15)])
def test_statistics_are_exact_and_unbiased_however_tokens_come_in_batches(sizes: Any) -> None:
    vectors = 1e3 + noise(40, 6, seed=3)
    running = Running.empty(6, is_full=True)
    for part in vectors.split(list(sizes)):
        running = running.plus(part)
    torch.testing.assert_close(running.deviation(), vectors.std(0), rtol=1e-10, atol=0)
    torch.testing.assert_close(running.scatter_ZZ / 39, vectors.T.cov(), rtol=1e-8, atol=1e-10)


def test_the_published_statistics_of_small_batches_are_a_sixth_too_large() -> None:
    """They add n var of a batch where (n - 1) var is meant."""
    vectors, count, mean, squares = noise(3000, 6, seed=3), 0, torch.zeros(6), torch.zeros(6)
    for part in vectors.split(3):
        total, shift = count + len(part), part.mean(0) - mean
        squares = squares + 3 * part.var(0) + shift.square() * (count * 3 / total)
        mean, count = mean + shift * 3 / total, total
    ratio = (squares / (count - 1)).sqrt() / vectors.std(0)
    assert 1.14 < float(ratio.mean()) < 1.17


def test_a_first_target_of_a_single_token_is_a_finite_edit() -> None:
    model = tiny_model("gpt2")
    one = replace(requests(1)[0], target="Paris")
    assert len(encode_with_target(model.tokenizer, one.full_prompt, "Paris").target_ids) == 1
    editor = ultraedit()
    plan, after = plan_of(model, editor, [one]), None
    for update in plan.updates.values():
        assert update.is_finite() and update.frobenius() > 0
    after = plan_of(model, editor, [one], plan.statistics)
    assert all(torch.isfinite(tensor).all() for tensor in after.statistics.values())


def test_gradients_are_whitened_once_there_are_more_tokens_than_coordinates() -> None:
    inputs, gradients = noise(30, 5, seed=4), noise(30, 4, seed=5) @ noise(4, 4, seed=6)
    empty = Normaliser.empty((4, 5), whitens=True)
    few = empty.plus(Factors(inputs[:5], gradients[:5]))
    diagonal = (gradients[:5] - gradients[:5].mean(0)) / gradients[:5].std(0)
    torch.testing.assert_close(few.maps()[1](gradients[:5]), diagonal, rtol=1e-4, atol=1e-6)
    whole = few.plus(Factors(inputs[5:], gradients[5:]))
    of_inputs, of_gradients = whole.maps()
    covariance = (gradients - gradients.mean(0)).T @ (gradients - gradients.mean(0)) / (30 - 4 - 1)
    values, vectors = torch.linalg.eigh(covariance)
    assert float(values.min()) > SMALLEST
    root = vectors @ torch.diag(values**-0.5) @ vectors.T
    torch.testing.assert_close(of_gradients(gradients), (gradients - gradients.mean(0)) @ root)
    wanted = (inputs - inputs.mean(0)) / (inputs.std(0) + torch.finfo(torch.float32).eps)
    torch.testing.assert_close(of_inputs(inputs), wanted, msg="inputs stay diagonal")
    restored = Normaliser.from_state("a", whole.state("a"))
    assert torch.equal(restored.maps()[1](gradients), of_gradients(gradients))


def test_matrices_of_a_shape_share_statistics_and_may_have_layers_of_their_own() -> None:
    model = tiny_model("llama", num_layers=3)
    editor = ultraedit(layers=(1,), matrices=("up", "gate"), layers_of={"gate": (0, 2)})
    names = [name.removeprefix("model.layers.") for name in editor.modules(model)]
    assert names == ["0.mlp.gate_proj", "1.mlp.up_proj", "2.mlp.gate_proj"]
    state = editor.init(model, Moments())
    assert {name.split(".")[0] for name in state} == {
        "x".join(map(str, model.weight(editor.modules(model)[0]).shape))
    }
    plan = plan_of(model, editor, requests(2))
    tokens = sum(update.rank for update in plan.updates.values())
    assert all(
        float(tensor) == tokens for name, tensor in plan.statistics.items() if "count" in name
    )


@pytest.mark.parametrize("whiten", ["diagonal", "full"])
def test_a_run_resumed_from_any_checkpoint_has_the_bits_of_a_whole_one(whiten: Any) -> None:
    def job() -> Any:
        asked = [replace(each, id=f"u/{index}") for index, each in enumerate(requests(6))]
        editor = ultraedit(whiten=whiten)
        return trajectory(tiny_model("gpt2"), asked, editor=editor, milestones=(0, 6))

    whole = list(run_edits(job()))
    states = [event for event in whole if isinstance(event, RunState)]
    for state in states[:-1]:
        rest = list(run_edits(job(), RunState.from_checkpoint(state.checkpoint({}))))
        last = next(event for event in reversed(rest) if isinstance(event, RunState))
        for name, tensor in states[-1].editor.items():
            assert torch.equal(last.editor[name], tensor), name
        for name, total in states[-1].totals.items():
            assert torch.equal(last.totals[name].dense(), total.dense())
        figures = [event.modules for event in rest if isinstance(event, StepRecord)]
        assert figures == [e.modules for e in whole if isinstance(e, StepRecord)][-len(figures) :]


def test_statistics_begin_with_those_of_requests_that_are_not_edited() -> None:
    model, [asked, *others] = tiny_model("gpt2"), requests(3)
    editor, warm = ultraedit(mini_batch=1), ultraedit(mini_batch=1, warm_up=2)
    state = editor.init(model, Moments())
    plan = warm.plan(step(model, [asked], state=state, pool=tuple(others)))
    for each in others:  # a run without updates
        state = editor.plan(step(model, [each], state=state)).statistics
    wanted = editor.plan(step(model, [asked], state=state))
    for name, update in wanted.updates.items():
        torch.testing.assert_close(plan.updates[name].dense(), update.dense())
    again = warm.plan(step(model, [asked], state=plan.statistics, pool=tuple(others)))
    once = editor.plan(step(model, [asked], state=plan.statistics))
    for name, tensor in once.statistics.items():
        assert torch.equal(again.statistics[name], tensor), "the warm-up happens once"
    with pytest.raises(OptionError, match="warm_up: must not be negative"):
        ultraedit(warm_up=-1)


def test_a_request_without_a_subject_is_edited_as_the_same_prompt_with_one() -> None:
    model, editor, [asked] = tiny_model("llama"), ultraedit(), requests(1)
    bare = replace(asked, prompt=asked.full_prompt, subject="")
    with_it, without = (plan_of(model, editor, [each]) for each in (asked, bare))
    for name, update in with_it.updates.items():
        assert torch.equal(update.dense(), without.updates[name].dense())


def test_wrong_options_are_reported_together() -> None:
    with pytest.raises(OptionError) as raised:
        ultraedit(layers=(), matrices=("up", "up"), layers_of={"gate": (1, 1)}, ridge=0.0)
    text = str(raised.value)
    for key in ("layers:", "matrices:", "layers_of:", "layers_of.gate:", "ridge:"):
        assert key in text
    with pytest.raises(ConfigError, match="no separate gate"):
        ultraedit(matrices=("gate",)).modules(tiny_model("gpt2"))
    with pytest.raises(ConfigError, match="expert of a mixture"):
        ultraedit().modules(family_model("mixtral", expert=1))
