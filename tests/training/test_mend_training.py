"""Training MEND: a step against plain functional calculus, the same bits again and after a cut,
splits, files, errors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call, grad

from editkit.errors import ConfigError
from editkit.hypernet.abstract import STEP_SIZES, name_of
from editkit.hypernet.examples import examples, locality_texts, split
from editkit.hypernet.learner import MendLearner
from editkit.hypernet.learning import Diverged, LearningState
from editkit.hypernet.measure import measure
from editkit.model.load import ModelConfig
from editkit.model.tokens import encode_with_target
from editkit.runner.checkpoint import read_checkpoint, write_checkpoint
from editkit.training.build import build_training
from editkit.training.session import checkpoint_of, learning_state, train
from editkit.types import EvalRecord, StepRecord, as_json
from tests.support.helpers import KINDS, Kind, tiny_model
from tests.support.hypernets import facts, learning, load_hypernetwork, options, random_network


def plain_step(training: Any, chosen: Any) -> tuple[dict[str, torch.Tensor], float, float]:
    """Gradients of both losses of a step by torch.func, edit by edit, with dense matrices; and the
    losses.
    """
    model, network = training.model, training.network
    weights = {f"{module}.weight": model.module(module).weight for module in network.modules}
    is_conv = model.network.config.model_type == "gpt2"
    fixed = {
        name: tensor for name, tensor in network.tensors.items() if name not in network.learned()
    }

    def logits(changed: Mapping[str, torch.Tensor], ids: Any) -> torch.Tensor:
        return (
            functional_call(model.network, dict(changed), (torch.tensor([ids]),))
            .logits[0]
            .log_softmax(dim=-1)
        )

    def nll(changed: Mapping[str, torch.Tensor], prompt: str, target: str) -> torch.Tensor:
        sequence = encode_with_target(model.tokenizer, prompt, target)
        log_p_TV = logits(changed, sequence.ids)
        return -torch.stack(
            [
                log_p_TV[place - 1, sequence.ids[place]]
                for place in range(sequence.start, len(sequence.ids))
            ]
        ).mean()

    def pairs(request: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        seen: dict[str, torch.Tensor] = {}
        length = len(encode_with_target(model.tokenizer, request.full_prompt, request.target).ids)

        def loss(extra: dict[str, torch.Tensor]) -> torch.Tensor:
            def hook_of(module: str) -> Any:
                def hook(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
                    seen[module] = args[0][0]
                    return output + extra[module]

                return hook

            hooks = [
                model.module(module).register_forward_hook(hook_of(module))
                for module in network.modules
            ]
            value = nll(weights, request.full_prompt, request.target)
            for handle in hooks:
                handle.remove()
            return value

        zeros = {module: torch.zeros(length, shape[0]) for module, shape in network.shapes.items()}
        gradients = grad(loss)(zeros)
        with torch.no_grad():
            loss(zeros)  # the inputs, outside of torch.func's wrappers
        return {module: (seen[module].detach(), gradients[module]) for module in network.modules}

    def updated(learned: Mapping[str, torch.Tensor], factors: Any) -> dict[str, torch.Tensor]:
        changed = {}
        for index, module in enumerate(network.modules):
            shape = network.shapes[module]
            key, place = name_of(shape), network.modules_of(shape).index(module)
            x_TI, d_TO = factors[module]
            deviation = (fixed[f"{key}.squares"] / (fixed[f"{key}.count"] - 1)).sqrt() + 1e-7
            z = (torch.cat([x_TI, d_TO], dim=1) - fixed[f"{key}.mean"].float()) / deviation.float()
            for layer in "12":
                inner = (
                    z @ learned[f"{key}.v{layer}"].T @ learned[f"{key}.u{layer}"].T
                    + learned[f"{key}.b{layer}"]
                )
                added = (
                    learned[f"{key}.scale{layer}"][place] * inner
                    + learned[f"{key}.shift{layer}"][place]
                )
                z = z + (torch.relu(added) if layer == "1" else added)
            z = z * (d_TO != 0).any(dim=1)[:, None]
            update_OI = -learned[STEP_SIZES][index] * z[:, shape[1] :].T @ z[:, : shape[1]]
            changed[f"{module}.weight"] = weights[f"{module}.weight"] + (
                update_OI.T if is_conv else update_OI
            )
        return changed

    def step_loss(
        learned: Mapping[str, torch.Tensor], factors: Any
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        edit, locality = torch.zeros(()), torch.zeros(())
        for example, own in zip(chosen, factors, strict=True):
            changed = updated(learned, own)
            edit = edit + nll(changed, example.paraphrase, example.request.target) / len(chosen)
            rows = []
            for probe in example.locality:
                ids = encode_with_target(model.tokenizer, probe.prompt, probe.answer).ids
                base = logits(weights, ids)
                rows.append((base.exp() * (base - logits(changed, ids))).sum(dim=-1))
            locality = locality + torch.cat(rows).mean() / len(chosen)
        return training.options.edit_weight * edit + training.options.locality_weight * locality, (
            edit,
            locality,
        )

    factors = [pairs(example.request) for example in chosen]
    gradients, (edit, locality) = grad(step_loss, has_aux=True)(network.learned(), factors)
    return gradients, float(edit), float(locality)


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_is_the_plain_one(kind: Kind) -> None:
    training = learning(tiny_model(kind))
    learner = MendLearner(training, None)
    before = {name: tensor.detach().clone() for name, tensor in learner.network.learned().items()}
    gradients, edit, locality = plain_step(training, learner.drawn(1))
    record = learner.take_step()
    assert record.target["edit_loss"] == pytest.approx(edit, rel=1e-4)
    assert record.target["locality_loss"] == pytest.approx(locality, rel=1e-3)
    for name, tensor in learner.network.learned().items():
        assert tensor.grad is not None
        assert float((tensor.grad - gradients[name]).norm()) < 2e-3 * float(
            gradients[name].norm()
        ), name
        # Adam's first step: a whole step against the sign, where the gradient is no rounding.
        is_clear = gradients[name].abs() > 1e-2 * gradients[name].abs().max()
        moved = (tensor.detach() - before[name])[is_clear]
        torch.testing.assert_close(
            moved, -1e-3 * gradients[name][is_clear].sign(), rtol=1e-2, atol=1e-6
        )


def test_edits_one_by_one_accumulate_to_the_gradient_of_all_at_once() -> None:
    gradients = []
    for at_once in (1, 4):
        learner = MendLearner(learning(tiny_model("gpt2"), accumulate=4, at_once=at_once), None)
        learner.take_step()
        gradients.append({name: tensor.grad for name, tensor in learner.network.learned().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-3, atol=1e-5)


def same(first: LearningState, second: LearningState) -> bool:
    groups = ("network", "adam", "chains", "best")
    return all(
        getattr(first, group).keys() == getattr(second, group).keys()
        and all(
            torch.equal(tensor, getattr(second, group)[name])
            for name, tensor in getattr(first, group).items()
        )
        for group in groups
    ) and (first.step, first.best_step, first.best_loss) == (
        second.step,
        second.best_step,
        second.best_loss,
    )


def plain(events: list[Any]) -> list[Any]:
    return [
        {**as_json(event), "seconds": None}
        for event in events
        if not isinstance(event, LearningState)
    ]


@pytest.mark.parametrize("sequence", [1, 2])
def test_the_same_seed_gives_the_same_bits_also_from_any_checkpoint(
    sequence: int, tmp_path: Path
) -> None:
    training = learning(tiny_model("llama"), sequence=sequence, steps=5)
    whole = list(training.run())
    last = whole[-1]
    assert isinstance(last, LearningState) and last.step == 5
    for index, event in enumerate(whole):
        if isinstance(event, LearningState) and event.step in (0, 1, 3):
            write_checkpoint(checkpoint_of(event, {}, inputs={}), tmp_path)
            saved = read_checkpoint(tmp_path)
            assert saved is not None
            rest: list[Any] = list(
                learning(tiny_model("llama"), sequence=sequence, steps=5).run(learning_state(saved))
            )
            assert plain(rest) == plain(whole[index + 1 :])
            assert same(rest[-1], last)


def test_a_chain_edits_what_was_edited_before_and_begins_anew_after_its_length() -> None:
    training = learning(tiny_model("gpt2"), sequence=2, steps=3)
    states = [event for event in training.run() if isinstance(event, LearningState)]
    assert [bool(state.chains) for state in states] == [False, True, True, True]
    name = next(iter(states[1].chains))
    ranks = [state.chains[name].shape[1] for state in states[1:]]
    assert ranks[1] > ranks[0] and ranks[2] < ranks[1]


@pytest.mark.slow
def test_training_makes_the_loss_smaller_and_keeps_the_best() -> None:
    events = list(learning(tiny_model("gpt2"), steps=30, validate_every=5, lr=0.01).run())
    losses = [
        event.measurement.value
        for event in events
        if isinstance(event, EvalRecord) and event.measurement.metric == "loss"
    ]
    state = events[-1]
    assert isinstance(state, LearningState)
    assert state.best_loss == min(value for value in losses if value is not None)
    trained = [
        event.target["loss"] for event in events if isinstance(event, StepRecord) and event.step
    ]
    assert sum(trained[-5:]) < sum(trained[:5])


def test_training_ends_early_where_nothing_gets_better() -> None:
    events = list(
        learning(
            tiny_model("gpt2"),
            steps=50,
            lr=1e-12,
            lr_step_sizes=1e-12,
            patience=4,
            validate_every=1,
        ).run()
    )
    state = events[-1]
    assert isinstance(state, LearningState)
    assert state.step < 50 and state.step - state.best_step == 4


def test_a_loss_that_is_not_finite_stops_training_behind_a_sound_state() -> None:
    model = tiny_model("gpt2")
    network = random_network(model)
    wild = network.with_tensors({STEP_SIZES: torch.full_like(network.tensors[STEP_SIZES], 1e38)})
    events: list[Any] = []
    with pytest.raises(Diverged, match=r"step 1: (loss|gradient) is not finite \(edits fact/"):
        for event in learning(model, network=wild).run():
            events.append(event)
    assert isinstance(events[-2], LearningState) and events[-2].step == 0
    assert all(bool(torch.isfinite(tensor).all()) for tensor in events[-2].network.values())
    assert events[-1].nonfinite in ("loss", "gradient")


def test_no_request_is_both_trained_on_and_left_to_runs() -> None:
    requests = facts()
    divided = split(requests, held_apart=4, validation=3, least=1, seed=0)
    parts = [
        {request.id for request in part}
        for part in (requests[:4], divided.train, divided.validation)
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 12
    assert divided == split(requests, held_apart=4, validation=3, least=1, seed=0)
    again = [*requests[:4], *facts(2, id="other/0"), *requests[4:]]
    assert "other/0" not in {
        request.id for request in split(again, held_apart=4, validation=3, least=1, seed=0).used
    }, "the same prompts"


def test_every_example_comes_once_before_any_comes_again() -> None:
    requests = facts()
    drawn = [
        example
        for step in (1, 2, 3)
        for example in examples(requests, seed=0, step=step, count=4, locality=3)
    ]
    assert {example.request.id for example in drawn} == {request.id for request in requests}
    assert all(example.paraphrase in example.request.paraphrases for example in drawn)
    assert all(
        len(example.locality) == 3 and set(example.locality) <= set(locality_texts(example.request))
        for example in drawn
    )


@pytest.mark.parametrize(
    ("changes", "held_apart", "problem"),
    [
        (
            {},
            11,
            r"too few requests after the 11 reserved ones \(got 1; expected "
            r"editor.train.validation=2 and at least 2 for training\)",
        ),
        (
            {"neighbours": ()},
            0,
            "none of the 12 requests for training has a locality text",
        ),
        ({"paraphrases": ()}, 0, "none of the 12 requests for training has a paraphrase"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(
    changes: dict[str, Any], held_apart: int, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        split(facts(**changes), held_apart=held_apart, validation=2, least=2, seed=0)


def test_options_out_of_range_are_named_all_at_once() -> None:
    with pytest.raises(ConfigError) as raised:
        options(steps=0, lr=-1.0, sequence=9)
    assert len(raised.value.problems) == 3


def test_chains_are_measured_when_they_are_complete() -> None:
    model = tiny_model("gpt2")
    drawn = examples(facts(), seed=0, step=1, count=4, locality=2)
    alone = measure(model, random_network(model), drawn, sequence=1)
    chained = measure(model, random_network(model), drawn, sequence=2)
    assert alone.keys() == chained.keys()
    assert alone["edit_loss"] != chained["edit_loss"]
    assert measure(model, random_network(model), drawn, sequence=1, rows=1)[
        "edit_loss"
    ] == pytest.approx(alone["edit_loss"], rel=1e-5)


OVERRIDES = (
    "model=tiny-gpt2",
    "editor=mend",
    "tracker=none",
    "editor.train.steps=2",
    "editor.train.validate_every=1",
)


def training_of(folder: Path, *overrides: str) -> Any:
    from editkit.config.compose import compose

    small = (
        "editor.train.validation=4",
        "editor.train.accumulate=2",
        "editor.train.at_once=2",
        "editor.network.rank=4",
        "checkpoint.every=1",
    )
    return build_training(
        compose([*OVERRIDES, *small, f"paths.outputs={folder}", *overrides]).config
    )


@pytest.mark.slow
def test_a_training_writes_what_a_run_writes_and_a_hypernetwork_that_a_run_takes(
    tmp_path: Path,
) -> None:
    from editkit.config.build import build
    from editkit.config.compose import compose

    training = training_of(tmp_path)
    assert train(training) == 0
    for name in (
        "config.yaml",
        "provenance.json",
        "steps.jsonl",
        "evals.jsonl",
        "state/latest.json",
        "figures/training.png",
        "DONE",
    ):
        assert (training.folder / name).exists(), name
    network, header = load_hypernetwork(str(training.folder))
    assert header.trained and header.facts["held_apart"] == training.editor.train.held_apart
    assert (
        json.loads((training.folder / "provenance.json").read_text())["model"]["fingerprint"]
        == header.fingerprint
    )
    assert not set(header.trained) & {
        request.id for request in training.data.requests[: training.editor.train.held_apart]
    }
    run = [
        f"editor.hypernetwork={training.folder}",
        "edits=2",
        "suite=none",
        f"paths.outputs={tmp_path / 'runs'}",
    ]
    build(compose([*OVERRIDES, *run]).config)
    again = network.tensors
    assert train(training) == 0, "done already"
    assert train(training_of(tmp_path, "resume=never")) == 0
    anew, _ = load_hypernetwork(str(training.folder))
    assert all(torch.equal(tensor, anew.tensors[name]) for name, tensor in again.items())

    def refuses(problem: str, training: Any) -> None:
        files = [
            (path, path.read_bytes())
            for path in sorted(training.folder.rglob("*"))
            if path.is_file() and path.name != ".lock"
        ]
        with pytest.raises(ConfigError, match=problem):
            train(training)
        assert files == [
            (path, path.read_bytes())
            for path in sorted(training.folder.rglob("*"))
            if path.is_file() and path.name != ".lock"
        ]

    elsewhere, llama = (
        replace(training, data=replace(training.data, digest="0" * 64)),
        replace(training, model=ModelConfig(id="asset:tiny-llama")),
    )
    refuses(r"dataset: .* is not what the run began with", elsewhere)
    refuses(
        "no bundled model",
        replace(training_of(tmp_path, "resume=never"), model=ModelConfig(id="asset:gone")),
    )
    (training.folder / "DONE").unlink()
    refuses(r"dataset: .* is not what the run began with", elsewhere)
    refuses("model: asset:tiny-llama is not what the run began with", llama)


@pytest.mark.slow
def test_a_training_that_diverges_keeps_its_checkpoint_and_says_where(tmp_path: Path) -> None:
    training = training_of(tmp_path, "editor.network.step_size=1e38")
    assert train(training) == 1
    failure = json.loads((training.folder / "FAILED.json").read_text())
    assert failure["kind"] == "diverged" and failure["saved_step"] == 0
    assert "lower editor.train.lr" in failure["error"]


def test_an_editor_without_training_says_so() -> None:
    from editkit.config.compose import compose

    with pytest.raises(
        ConfigError,
        match=r"nothing to train \(got 'rome'; .*\. Fix: choose editor=mend, malmen, rledit or serac\.",
    ):
        build_training(compose(["editor=rome"]).config, choices={"editor": "rome"})
