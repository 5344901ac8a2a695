"""Training SERAC's pair: a step against a plain one, the same bits after a cut, the file of a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from editkit.api.session import Session
from editkit.editors.scoped_memory import ScopedMemory, mean_embeddings
from editkit.editors.serac import Serac
from editkit.errors import ConfigError, OptionError
from editkit.hypernet.examples import examples, split
from editkit.hypernet.learning import LearningState
from editkit.hypernet.store import PAIR, read_header, save_trained
from editkit.model.editable import EditableModel
from editkit.model.tokens import encode, encode_prompts, encode_with_target
from editkit.runner.checkpoint import read_checkpoint, write_checkpoint
from editkit.training.serac import PairLearning, _Learner
from editkit.training.session import checkpoint_of, learning_state
from editkit.types import EvalRecord, StepRecord
from tests.editors.test_serac import SERAC, TRAIN
from tests.support.helpers import tiny_model
from tests.support.hypernets import facts


def learning(model: EditableModel, **changes: Any) -> PairLearning:
    editor = replace(SERAC, train=replace(TRAIN, **changes))
    divided = split(facts(), held_apart=3, validation=2, least=2, seed=0)
    return PairLearning(model=model, editor=editor, split=divided, seed=0, checkpoint_every=1)


def test_a_steps_losses_and_gradients_are_those_of_a_plain_computation() -> None:
    model = tiny_model("gpt2")
    made = learning(model)
    learner = _Learner(made, None)
    network, head = learner.memory.network, learner.memory.head_WF
    chosen = examples(made.split.train, seed=0, step=1, count=2, locality=2)

    def nll(prompt: str, example: Any) -> torch.Tensor:
        request = example.request
        [before] = encode(model.tokenizer, [f"{request.full_prompt} {request.target}\n"])
        sequence = encode_with_target(model.tokenizer, prompt, request.target)
        logits = network(torch.tensor([[*before.ids, *sequence.ids[:-1]]])).logits[0]
        own = logits[-len(sequence.target_ids) :]
        return torch.nn.functional.cross_entropy(own, torch.tensor(sequence.target_ids))

    def far(one: str, other: str) -> torch.Tensor:
        rows = encode_prompts(model.tokenizer, [one, other])
        a, b = mean_embeddings(network, rows)
        return (head @ a - head @ b).square().sum()

    texts = [(each.request.full_prompt, each) for each in chosen]
    texts += [(each.paraphrase, each) for each in chosen]
    edit = torch.stack([nll(prompt, example) for prompt, example in texts]).mean()
    own = [far(each.paraphrase, each.request.full_prompt) for each in chosen]
    near = [
        far(probe.prompt, each.request.full_prompt) for each in chosen for probe in each.locality
    ]
    others = [
        far(chosen[0].paraphrase, chosen[1].request.full_prompt),
        far(chosen[1].paraphrase, chosen[0].request.full_prompt),
    ]
    outside = [-(1 - (-torch.stack(each)).exp()).log().mean() for each in (near, others)]
    scope = (torch.stack(own).mean() + sum(outside)) / 3
    gradients = torch.autograd.grad(edit + scope, [head, *network.parameters()])
    record = learner.take_step()
    assert record.target["edit_loss"] == pytest.approx(float(edit.detach()), abs=1e-5)
    assert record.target["locality_loss"] == pytest.approx(float(scope.detach()), abs=1e-5)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert record.target["gradient_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert learner.step == 1


def test_a_training_goes_on_from_every_checkpoint_with_the_same_bits(tmp_path: Path) -> None:
    model = tiny_model("llama")
    whole = list(learning(model).run())
    states = [event for event in whole if isinstance(event, LearningState)]
    assert [state.step for state in states] == [0, 1, 2, 3, 4]
    write_checkpoint(checkpoint_of(states[1], {}, inputs={}), tmp_path / "state")
    read = learning_state(read_checkpoint(tmp_path / "state"))
    rest = list(learning(model).run(read))
    last = next(event for event in reversed(rest) if isinstance(event, LearningState))
    for group in ("network", "adam", "best"):
        ours, theirs = getattr(last, group), getattr(states[-1], group)
        assert ours.keys() == theirs.keys() and ours
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    losses = [each.target for each in whole if isinstance(each, StepRecord) and each.step > 1]
    assert [each.target for each in rest if isinstance(each, StepRecord)] == losses
    metrics = {each.measurement.metric for each in rest if isinstance(each, EvalRecord)}
    assert {"efficacy", "generalization", "locality", "loss"} <= metrics


def saved(model: EditableModel, folder: Path) -> Serac:
    """An editor with a pair that was trained for a few steps."""
    made = learning(model, lr_head=0.05)
    state = [event for event in made.run() if isinstance(event, LearningState)][-1]
    save_trained(
        folder / PAIR.file,
        state.best,
        modules={},
        network=made.config(),
        model=model.name,
        fingerprint=model.fingerprint,
        dataset="d",
        trained=made.split.used,
        facts={"held_apart": 3},
    )
    return replace(SERAC, pair=str(folder))


def test_a_run_reads_the_pair_and_refuses_one_that_does_not_belong(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    editor = saved(model, tmp_path)
    assert read_header(str(tmp_path), PAIR).network["fact"] == "{}\n"
    session = Session(model, editor)
    session.edit(facts()[0])
    [side] = model.sides
    assert isinstance(side, ScopedMemory) and side.head_WF.shape[0] == TRAIN.width
    assert not torch.equal(
        side.network.get_input_embeddings().weight, model.network.get_input_embeddings().weight
    )
    model.reset()
    with pytest.raises(ConfigError, match=r"pair: .* was trained for another model"):
        Session(tiny_model("llama"), editor)
    with pytest.raises(ConfigError, match=r"fact: .* was trained with another one"):
        Session(model, replace(editor, fact="{}"))
    state = editor.init(model, None)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="is not the file that this run began with"):
        replace(editor).attach(model, {**state, "pair": 0 * state["pair"]})
    [problem] = replace(editor, pair=str(tmp_path / "none")).lacks()
    assert problem.startswith("pair: there is no file")


def test_options_of_the_training_out_of_range_are_named_together() -> None:
    with pytest.raises(ConfigError) as raised:
        replace(TRAIN, steps=0, lr=-1.0)
    assert len(raised.value.problems) == 2
