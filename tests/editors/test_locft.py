"""LocFT-BF: plain torch on the parameter itself, the end of a target, skipped steps, the order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from editkit.editors.locft import LocFt
from editkit.errors import ConfigError, OptionError
from editkit.model.editable import EditableModel
from editkit.model.tokens import encode_with_target
from editkit.runner.checkpoint import RunState
from editkit.runner.loop import run_edits
from editkit.stats.store import Moments
from editkit.types import EditRequest
from tests.support.fakes import trajectory
from tests.support.helpers import KINDS, requests, tiny_model
from tests.support.methods import step


def locft(**changes: Any) -> LocFt:
    options: dict[str, Any] = {
        "name": "locft",
        "layers": (1,),
        "targets": None,
        "epochs": 3,
        "mini_batch": 2,
        "lr": 0.01,
        "end_of_sequence": True,
        "skip_loss": 0.0,
        "stop_loss": 0.0,
    } | changes
    return LocFt(**options)


def plan_of(model: EditableModel, editor: LocFt, asked: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return editor.plan(step(model, asked))


def plain_loss(model: EditableModel, asked: list[EditRequest], *, with_end: bool) -> torch.Tensor:
    """Mean over requests of the mean over target tokens and the end, one pass each, all logits."""
    losses = []
    for each in asked:
        text = encode_with_target(model.tokenizer, each.full_prompt, each.target)
        ids = [*text.ids, *([model.tokenizer.eos_token_id] if with_end else [])]
        logits = model.network(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        places = torch.arange(text.start - 1, len(ids) - 1)
        losses.append(-logits[places, torch.tensor(ids[text.start :])].mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_end", [True, False])
def test_the_update_is_what_shuffled_epochs_of_adam_do_to_the_matrix_itself(
    kind: Any, with_end: bool
) -> None:
    model, plain, asked = tiny_model(kind), tiny_model(kind), requests(3)
    editor = locft(end_of_sequence=with_end)
    (module,) = editor.modules(model)
    plan = plan_of(model, editor, asked)
    parameter = plain.module(module).weight.requires_grad_()
    before = parameter.detach().clone()
    adam = torch.optim.Adam([parameter], lr=0.01)
    torch.manual_seed(0)
    for _ in range(3):
        order = torch.randperm(3).tolist()
        for part in (order[:2], order[2:]):
            adam.zero_grad()
            plain_loss(plain, [asked[i] for i in part], with_end=with_end).backward()
            adam.step()
    moved = (parameter.detach() - before).T if kind == "gpt2" else parameter.detach() - before
    assert float((plan.updates[module] - moved).norm() / moved.norm()) < 2e-2
    with torch.no_grad():
        assert plan.summary["loss"] == pytest.approx(
            float(plain_loss(plain, asked, with_end=with_end)), rel=1e-3
        )
    assert plan.summary["steps"] == 6 and plan.nonfinite is None


def test_the_model_stops_after_a_target_only_if_its_end_is_trained() -> None:
    def after(with_end: bool) -> float:
        model, [asked] = tiny_model("llama"), requests(1)
        editor = locft(end_of_sequence=with_end, epochs=10)
        model.edit(editor.modules(model))
        for module, update in plan_of(model, editor, [asked]).updates.items():
            model.apply(module, update)
        ids = encode_with_target(model.tokenizer, asked.full_prompt, asked.target).ids
        with torch.no_grad():
            logits = model.network(torch.tensor([ids])).logits[0, -1]
        return float(logits.softmax(dim=-1)[model.tokenizer.eos_token_id])

    assert after(True) > 3 * after(False)


def test_a_mini_batch_or_an_epoch_with_a_small_loss_is_not_trained_further() -> None:
    model, asked = tiny_model("gpt2"), requests(3)
    assert plan_of(model, locft(skip_loss=1e9), asked).summary["steps"] == 0
    assert plan_of(model, locft(stop_loss=1e9), asked).summary["steps"] == 2, "one epoch"


def test_edits_are_trained_in_an_order_that_the_seed_gives() -> None:
    model, asked = tiny_model("gpt2"), requests(3)
    first, again, other = (
        next(iter(plan_of(model, locft(mini_batch=1), asked, seed).updates.values()))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_run_resumed_from_any_checkpoint_has_the_bits_of_a_whole_one() -> None:
    def job() -> Any:
        asked = [replace(each, id=f"l/{index}") for index, each in enumerate(requests(6))]
        editor = locft(epochs=2)
        return trajectory(
            tiny_model("gpt2"), asked, editor=editor, batch_size=2, checkpoint_every=1
        )

    states = [event for event in run_edits(job()) if isinstance(event, RunState)]
    for state in states[:-1]:
        rest = list(run_edits(job(), RunState.from_checkpoint(state.checkpoint({}))))
        last = next(event for event in reversed(rest) if isinstance(event, RunState))
        for name, total in states[-1].totals.items():
            assert torch.equal(last.totals[name].dense(), total.dense())


def test_other_matrices_are_named_within_their_block() -> None:
    model = tiny_model("llama")
    editor = locft(layers=(0, 1), targets=("self_attn.q_proj", "mlp.up_proj"))
    assert [name.removeprefix("model.layers.") for name in editor.modules(model)] == [
        "0.self_attn.q_proj",
        "0.mlp.up_proj",
        "1.self_attn.q_proj",
        "1.mlp.up_proj",
    ]
    updates = plan_of(model, editor, requests(2)).updates
    assert {name: update.shape for name, update in updates.items()} == {
        name: model.weight(name).shape for name in editor.modules(model)
    }
    with pytest.raises(ConfigError, match=r"editor.layers: .* layers 0 to"):
        locft(layers=(9,), targets=("mlp.up_proj",)).modules(model)


def test_a_tokenizer_without_an_end_is_refused_before_the_first_edit() -> None:
    model = tiny_model("gpt2")
    model.tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"end_of_sequence: .* set editor.end_of_sequence=false"):
        locft().init(model, Moments())
    assert locft(end_of_sequence=False).init(model, Moments()) == {}


def test_wrong_options_are_reported_together() -> None:
    with pytest.raises(OptionError) as raised:
        locft(layers=(), targets=("a", "a"), epochs=0, mini_batch=0, lr=-1.0, stop_loss=-1.0)
    for key in ("layers:", "targets:", "epochs:", "mini_batch:", "lr:", "stop_loss:"):
        assert key in str(raised.value)
