"""LoRA and AdaLoRA: peft's own computation, a plain training, and the two places of an adapter."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from editkit.api.session import Session
from editkit.editors.adapter import Adapter, Allocation, Shape
from editkit.editors.lora import AbstractLora, Lora, MergedLora
from editkit.errors import ConfigError, OptionError
from editkit.model.editable import EditableModel
from editkit.model.tokens import encode_with_targets
from editkit.runner.checkpoint import RunState
from editkit.runner.loop import run_edits
from editkit.types import EvalRecord, StepRecord
from tests.support.fakes import trajectory
from tests.support.helpers import Kind, request, requests, tiny_model
from tests.support.sides import assert_each_sequence_is_routed_by_itself

ALLOCATION = Allocation(
    initial_rank=4, warmup=0.2, final=0.3, every=1, beta1=0.85, beta2=0.85, orthogonality=0.5
)
TARGETS = {
    "gpt2": ("attn.c_attn", "mlp.c_proj"),
    "llama": ("self_attn.q_proj", "mlp.down_proj"),
    "gptj": ("attn.q_proj", "mlp.fc_out"),
}
ALLOCATIONS = [pytest.param(None, id="lora"), pytest.param(ALLOCATION, id="adalora")]


def lora(
    kind: Kind, allocation: Allocation | None = None, editor: Callable[..., Any] = Lora
) -> Any:
    return editor(
        name="lora",
        layers=(0, 1),
        targets=TARGETS[kind],
        rank=2,
        alpha=4.0,
        dropout=0.0,
        steps=6,
        lr=0.02,
        stop_loss=0.0,
        allocation=allocation,
    )


def logits(model: EditableModel) -> torch.Tensor:
    with torch.no_grad():
        return model.network(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10, 11]])).logits


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_side_computes_what_pefts_module_does(kind: Kind, allocation: Allocation | None) -> None:
    model, editor = tiny_model(kind), lora(kind, allocation)
    modules = editor.modules(model)
    shape = Shape(rank=2, alpha=4.0, dropout=0.0, steps=6, allocation=allocation)
    adapter = Adapter(model, modules, shape)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters:
            parameter.normal_(std=0.3)
            parameter[..., 1:2, :] *= parameter.shape[-1] != 1  # a rank that was taken away
        for side in adapter.sides():
            inputs = torch.randn(2, 3, model.weight(side.module).shape[1])
            outputs = model.module(side.module)(inputs)
            theirs = adapter._layers[side.module](inputs)
            for ours in (side, side.trimmed()):
                assert torch.allclose(ours.changed(inputs, outputs), theirs, atol=1e-5)
            assert len(side.trimmed().scales_R) == (2 if allocation is None else 3)


def trained_plainly(model: EditableModel, editor: AbstractLora, seed: int) -> torch.nn.Module:
    """peft's model of a copy of the network, after a training that is written here."""
    import peft

    network = copy.deepcopy(model.network)
    allocation, steps = editor.allocation, editor.steps
    given: dict[str, Any] = {
        "target_modules": list(editor.modules(model)),
        "lora_alpha": editor.alpha,
        "task_type": "CAUSAL_LM",  # without it peft leaves AdaLoRA's penalty out
        "fan_in_fan_out": "c_attn" in editor.targets[0],
    }
    torch.manual_seed(seed)
    if allocation is None:
        config = peft.LoraConfig(r=editor.rank, **given)
    else:
        first, last = int(allocation.warmup * steps), int(allocation.final * steps)
        config = peft.AdaLoraConfig(
            target_r=editor.rank, init_r=4, tinit=first, tfinal=last, total_step=steps, **given
        )
    wrapped = peft.get_peft_model(network, config)
    [sequence] = encode_with_targets(model.tokenizer, [request().probe()])
    ids = torch.tensor([sequence.ids[:-1]])
    labels = torch.full_like(ids, -100)
    labels[0, sequence.start - 1 :] = torch.tensor(sequence.target_ids)
    adam = torch.optim.Adam(
        [each for each in wrapped.parameters() if each.requires_grad], editor.lr
    )
    for step in range(1, steps + 1):
        outputs = wrapped(input_ids=ids, labels=labels, shift_labels=labels)
        adam.zero_grad()
        outputs.loss.backward()
        adam.step()
        if allocation is not None:
            wrapped.base_model.update_and_allocate(step)
    return wrapped


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_edit_is_a_training_by_peft_alone(kind: Kind, allocation: Allocation | None) -> None:
    model, editor = tiny_model(kind), lora(kind, allocation)
    wrapped = trained_plainly(model, editor, seed=3)
    before = logits(model)
    Session(model, editor, seed=3).edit(request())
    with torch.no_grad():
        theirs = wrapped(input_ids=torch.tensor([[5, 6, 7, 8, 9, 10, 11]])).logits
    assert (theirs - before).abs().max() > 0.05
    assert torch.allclose(logits(model), theirs, atol=2e-4)
    if allocation is not None:  # EasyEdit never calls the allocation: all ranks would be left
        ranks = sum(len(side.state()["scales"]) for side in model.sides)
        assert ranks == editor.rank * len(editor.modules(model))


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("kind", ["gpt2"])
def test_merged_and_beside_are_the_same_method(kind: Kind, allocation: Allocation | None) -> None:
    models = []
    for editor in (Lora, MergedLora):
        model = tiny_model(kind)
        session = Session(model, lora(kind, allocation, editor))
        results = [session.edit(each) for each in requests(3)]
        models.append(model)
    beside, merged = models
    assert beside.sides and not merged.sides
    assert torch.allclose(logits(beside), logits(merged), atol=2e-4)
    for name, total in merged.totals().items():
        (product,) = [side.product() for side in beside.sides if side.module == name] or [None]
        found = total.dense()
        assert torch.allclose(found, 0 * found if product is None else product.dense(), atol=1e-5)
    assert torch.equal(beside.weight(name), tiny_model(kind).weight(name))
    head = beside.network.get_output_embeddings().weight  # tied in GPT-2
    assert torch.equal(head, merged.network.get_output_embeddings().weight)
    assert "rank 4 update" in str(results[-1]) or allocation is not None


def test_ranks_that_are_never_allocated_stay_as_they_were() -> None:
    model = tiny_model("llama")
    never = replace(ALLOCATION, every=0)
    Session(model, lora("llama", never)).edit(request())
    assert [len(side.state()["scales"]) for side in model.sides] == [4] * 4


def test_undo_gives_the_unedited_model_bit_for_bit_and_the_next_edit_goes_on_from_it() -> None:
    model = tiny_model("gpt2")
    before, session = logits(model), Session(model, lora("gpt2"))
    session.edit(request(0))
    once = logits(model)
    session.edit(request(1))
    model.undo()
    assert torch.equal(logits(model), once)
    again = session.edit(request(1))
    model.undo()
    model.undo()
    assert torch.equal(logits(model), before)
    assert again.side is not None
    assert again.side["ranks"] == 8
    assert "8 ranks" in str(again)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("editor", [Lora, MergedLora])
def test_a_run_resumed_from_any_checkpoint_has_the_records_and_the_bits_of_a_whole_one(
    editor: Callable[..., Any], allocation: Allocation | None
) -> None:
    def job() -> Any:
        # dropout draws from the generator, whose state has to come back
        made = replace(lora("gpt2", allocation, editor), dropout=0.2, steps=3)
        asked = [replace(each, id=f"lora/{index}") for index, each in enumerate(requests(4))]
        return trajectory(tiny_model("gpt2"), asked, editor=made, milestones=(0, 4))

    def plain(events: list[Any]) -> list[Any]:
        kept = [event for event in events if not isinstance(event, RunState)]
        return [replace(e, seconds={}) if isinstance(e, StepRecord) else e for e in kept]

    whole = list(run_edits(job()))
    states = [event for event in whole if isinstance(event, RunState)]
    for state in states[:-1]:
        rest = list(run_edits(job(), RunState.from_checkpoint(state.checkpoint({}))))
        assert plain(rest) == plain(whole[whole.index(state) + 1 :])
        last = next(event for event in reversed(rest) if isinstance(event, RunState))
        for name, tensor in states[-1].editor.items():
            assert torch.equal(last.editor[name], tensor)
    routing = {
        (event.measurement.metric, event.measurement.value)
        for event in whole
        if isinstance(event, EvalRecord) and event.measurement.kind == "routing"
    }
    # It is not routed: every prompt goes through it.
    assert routing == ({("recall", 1.0), ("false_alarms", 1.0)} if editor is Lora else set())


def test_every_sequence_has_its_own_numbers_whatever_batch_padding_and_cache() -> None:
    model = tiny_model("gptj")
    session = Session(model, lora("gptj"))
    for each in requests(3):
        session.edit(each)
    assert_each_sequence_is_routed_by_itself(model)


def test_options_out_of_range_are_named_together() -> None:
    with pytest.raises(OptionError) as raised:
        replace(
            lora("gpt2"),
            **{"rank": 0, "alpha": -1.0, "dropout": 1.0, "steps": 0, "lr": 0.0, "stop_loss": -1.0},
            layers=(1, 1),
            targets=(),
        )
    named = [problem.partition(":")[0] for problem in raised.value.problems]
    assert named == ["rank", "alpha", "steps", "lr", "dropout", "stop_loss", "layers", "targets"]
    with pytest.raises(OptionError) as raised:
        replace(lora("gpt2"), allocation=replace(ALLOCATION, initial_rank=2, final=0.7), steps=3)
    assert list(raised.value.problems) == [
        "allocation.initial_rank: AdaLoRA begins above its final rank (got 2; expected more than "
        "rank=2).",
        "steps: too few before the last allocation (got 1; expected at least 2).",
    ]
    with pytest.raises(OptionError) as raised:
        replace(ALLOCATION, warmup=0.6, final=0.4, beta1=1.0, every=-1, orthogonality=-1.0)
    named = [problem.partition(":")[0] for problem in raised.value.problems]
    assert named == ["beta1", "warmup", "every", "orthogonality"]


def test_a_target_or_layer_that_is_not_there_is_named() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(ConfigError, match=r"transformer.h.0.attn.q_proj: .* no such module"):
        Session(model, replace(lora("gpt2"), targets=("attn.q_proj",)))
    with pytest.raises(ConfigError, match=r"editor.layers: .*got \[9\]"):
        Session(model, replace(lora("gpt2"), layers=(0, 9)))


def test_without_peft_the_run_ends_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else find(name)
    )
    [problem] = lora("gpt2").lacks()
    assert "pip install 'editkit[peft]'" in problem
