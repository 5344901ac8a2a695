"""KN's scores equal integrated gradients by the whole network; its updates change the columns of the
neurons that it chose.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from editkit.datasets.base import LoadedDataset
from editkit.editors.kn import Kn, points_of, selected
from editkit.errors import ConfigError
from editkit.model.editable import EditableModel
from editkit.model.tokens import encode_with_targets
from editkit.stats.store import Moments
from editkit.targets.attribution import attributions, neurons_of, row_of
from tests.support.families import family_model
from tests.support.helpers import KINDS, request, requests, tiny_model
from tests.support.methods import step

CONTEXTS = ("{}", "So it is. {}", "The capital. {}")


def kn(**changes: Any) -> Kn:
    options: dict[str, Any] = {
        "name": "kn",
        "layers": None,
        "answer": "old",
        "steps": 4,
        "rule": "right",
        "threshold": 0.2,
        "refine": "contexts",
        "share": 0.7,
        "context_lengths": ((4, 2),),
        "subtract": 1.0,
        "add": 8.0,
        "unit": "relative",
        "embeddings": "input",
        "rows_at_once": 5,
    }
    return Kn(**options | changes)


def plain_probability(
    model: EditableModel, layer: int, ids: tuple[int, ...], token: int, neurons_I: torch.Tensor
) -> torch.Tensor:
    """Of a token after a text, with these neurons in a layer at the last position."""

    def replaced(_module: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
        moved = inputs[0].clone()
        moved[0, -1] = neurons_I
        return (moved,)

    module = model.module(model.family.down_projection(layer))
    handle = module.register_forward_pre_hook(replaced)
    try:
        logits = model.network(input_ids=torch.tensor([ids])).logits
        return logits[0, -1].softmax(dim=-1)[token]
    finally:
        handle.remove()


def plain_scores(
    model: EditableModel, layer: int, ids: tuple[int, ...], token: int, points: list[float]
) -> torch.Tensor:
    module = model.family.down_projection(layer)
    neurons_I = neurons_of(model, [module], [row_of(ids, token)])[module][0]
    total_I = torch.zeros_like(neurons_I)
    for point in points:
        here_I = (point * neurons_I).requires_grad_()
        total_I += torch.autograd.grad(plain_probability(model, layer, ids, token, here_I), here_I)[
            0
        ]
    return neurons_I * total_I / len(points)


def texts_of(model: EditableModel, count: int = 3) -> list[tuple[tuple[int, ...], int]]:
    """The edited prompts up to each token of the old answers, and these tokens."""
    probes = [each.probe(answer=each.target_old) for each in requests(count)]
    encoded = encode_with_targets(model.tokenizer, probes)
    return [
        (each.ids[:end], each.ids[end])
        for each in encoded
        for end in range(each.start, len(each.ids))
    ]


@pytest.mark.parametrize("kind", [*KINDS, "gemma2"])
def test_scores_are_integrated_gradients_of_the_whole_network(kind: Any) -> None:
    # Gemma 2 has a norm after its MLP.
    model = tiny_model(kind, dtype="float64") if kind in KINDS else family_model(kind)
    texts, points = texts_of(model), points_of(3, "right")
    rows = [row_of(*text) for text in texts]
    assert len(rows) > 3, "an answer has several tokens"
    modules = model.down_projections(range(model.num_layers))
    neurons = neurons_of(model, modules, rows)
    for layer, module in enumerate(modules):
        found_RI = attributions(model, layer, rows, neurons[module], points=points, rows_at_once=4)
        plain_RI = torch.stack([plain_scores(model, layer, *text, points) for text in texts])
        close = 1e-10 if kind in KINDS and kind != "gptj" else 1e-4
        assert float((found_RI - plain_RI).norm() / plain_RI.norm()) < close


def test_the_scores_of_a_layer_add_up_to_what_its_neurons_do_to_the_probability() -> None:
    model = tiny_model("llama", dtype="float64")
    (ids, token), *_ = texts_of(model)
    [module] = model.down_projections([1])
    row = row_of(ids, token)
    neurons = neurons_of(model, [module], [row])[module]
    with torch.no_grad():
        whole, none = (
            float(plain_probability(model, 1, ids, token, scale * neurons[0])) for scale in (1, 0)
        )
    [left, right] = (
        float(
            attributions(
                model, 1, [row], neurons, points=points_of(50, rule), rows_at_once=64
            ).sum()
        )
        for rule in ("left", "right")
    )
    assert (left + right) / 2 == pytest.approx(whole - none, rel=1e-3)  # the trapezoidal rule


def test_the_points_are_those_of_the_paper_of_its_code_and_of_easyedit() -> None:
    assert points_of(4, "right") == [0.25, 0.5, 0.75, 1.0]
    assert points_of(4, "left") == [0.0, 0.25, 0.5, 0.75]
    assert points_of(3, "ends") == [0.0, 0.5, 1.0]
    assert points_of(1, "ends") == [0.0], "EasyEdit's Llama files: one gradient, at zero"


def test_a_neuron_counts_by_the_largest_score_of_all_layers_and_by_the_share_of_prompts() -> None:
    scores = {
        "a": torch.tensor([[1.0, 0.2, -5.0, 0.19], [0.1, 2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 9.0]]),
        "b": torch.tensor([[0.5, 0.1], [9.0, 0.0], [2.0, 0.0]]),
    }

    def chosen(**changes: Any) -> dict[str, list[int]]:
        found = selected(scores, **{"threshold": 0.2, "share": 0.0} | changes)
        return {name: is_chosen.nonzero()[:, 0].tolist() for name, is_chosen in found.items()}

    assert chosen() == {"a": [0, 1, 3], "b": [0]}
    assert chosen(share=0.6) == {"a": [1], "b": [0]}
    assert chosen(share=1.0) == {"a": [], "b": [0]}
    assert chosen(threshold=1.0) == {"a": [0, 3], "b": [0]}
    assert chosen(threshold=0.0) == {"a": [0, 1, 3], "b": [0, 1]}, "a negative score never counts"
    nothing = selected({"a": -torch.ones(2, 3)}, threshold=0.2, share=0.5)
    assert not nothing["a"].any(), "no neuron speaks for the answer"


@pytest.mark.parametrize("unit", ["absolute", "relative"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_columns_of_the_chosen_neurons_get_the_new_embedding_for_the_old(
    kind: Any, unit: Any
) -> None:
    model, editor = tiny_model(kind), kn(unit=unit)
    asked = dataclasses.replace(request(), target_old="Los Angeles")
    here = step(model, [asked], CONTEXTS)
    plan = editor.plan(here)
    modules, before = editor.modules(model), model.weight
    assert len(modules) == model.num_layers and plan.nonfinite is None
    weights = {name: before(name).clone() for name in modules}
    model.edit(modules)
    for module in modules:
        model.apply(module, editor.propose(here, module, plan))
    table = model.network.get_input_embeddings().weight

    def embedding(answer: str) -> torch.Tensor:
        """The mean over its tokens, of which the first begins with a blank, and none is BOS."""
        [encoded] = encode_with_targets(model.tokenizer, [asked.probe(answer=answer)])
        assert model.tokenizer.decode(encoded.target_ids).strip() == answer
        mean_O = table[list(encoded.target_ids)].mean(dim=0)
        return mean_O / mean_O.norm() if unit == "relative" else mean_O

    expected_O = 8 * embedding("English") - embedding("Los Angeles")
    num_chosen = 0
    for module, weight_OI in weights.items():
        change_OI = model.weight(module) - weight_OI
        chosen = change_OI.abs().amax(dim=0).nonzero()[:, 0].tolist()
        num_chosen += len(chosen)
        for column in chosen:
            length = weight_OI[:, column].norm() if unit == "relative" else 1.0
            torch.testing.assert_close(
                change_OI[:, column], length * expected_O, rtol=1e-3, atol=1e-5
            )
    assert num_chosen == plan.summary["neurons"] > 0


def test_a_second_edit_has_the_length_of_the_unedited_columns_and_does_not_grow() -> None:
    model, editor = tiny_model("llama"), kn(refine="none")
    here, modules = step(model, [request()]), editor.modules(model)
    weights = {name: model.weight(name).clone() for name in modules}
    model.edit(modules)
    for _ in range(2):
        plan = editor.plan(here)
        for module in modules:
            update = plan.updates[module]
            lengths_I, chosen_I = weights[module].norm(dim=0), update.right_IR.sum(dim=1)
            assert torch.equal(chosen_I[chosen_I > 0], lengths_I[chosen_I > 0])
            model.apply(module, update)


def test_neurons_are_those_of_the_old_answer_in_most_of_the_prompts() -> None:
    model, asked = tiny_model("llama"), request()
    editor = kn(steps=3)
    plan = editor.plan(step(model, [asked], CONTEXTS))
    by_prompt: list[dict[str, torch.Tensor]] = []
    for context in CONTEXTS:
        prompt = context.replace("{}", asked.full_prompt)
        [text] = encode_with_targets(
            model.tokenizer, [asked.probe(prompt=prompt, answer=asked.target_old)]
        )
        rows = [
            plain_scores_of_all(model, text.ids[:end], text.ids[end], points_of(3, "right"))
            for end in range(text.start, len(text.ids))
        ]
        by_prompt.append(
            {name: torch.stack([row[name] for row in rows]).mean(dim=0) for name in rows[0]}
        )
    stacked = {name: torch.stack([scores[name] for scores in by_prompt]) for name in by_prompt[0]}
    expected = selected(stacked, threshold=0.2, share=0.7)
    for module, is_chosen_I in expected.items():
        found_I = plan.updates[module].right_IR.sum(dim=1) > 0
        assert torch.equal(found_I, is_chosen_I)


def plain_scores_of_all(
    model: EditableModel, ids: tuple[int, ...], token: int, points: list[float]
) -> dict[str, torch.Tensor]:
    names = model.down_projections(range(model.num_layers))
    return {name: plain_scores(model, at, ids, token, points) for at, name in enumerate(names)}


def test_prompts_to_refine_over_are_contexts_or_paraphrases_and_never_both() -> None:
    model, asked = tiny_model("gpt2"), request()
    generator = torch.Generator().manual_seed(0)
    assert kn(refine="none").contexts(model, generator) == ("{}",)
    assert kn(refine="paraphrases").contexts(model, generator) == ("{}",)
    assert len(kn().contexts(model, generator)) == 3
    editor = kn(refine="paraphrases", share=0.5)
    plan = editor.plan(step(model, [asked]))
    alone = kn(refine="none").plan(step(model, [asked]))
    assert any(
        not torch.equal(plan.updates[name].right_IR, alone.updates[name].right_IR)
        for name in editor.modules(model)
    )


def test_what_the_model_says_can_take_the_place_of_the_old_answer() -> None:
    model, asked = tiny_model("llama"), dataclasses.replace(request(), target_old=None)
    plan = kn(answer="predicted", unit="absolute").plan(step(model, [asked], CONTEXTS))
    [encoded] = encode_with_targets(model.tokenizer, [asked.probe()])
    with torch.no_grad():
        ids = torch.tensor([encoded.ids[: encoded.start]])
        said = int(model.network(input_ids=ids).logits[0, -1].argmax())
    table = model.network.get_input_embeddings().weight
    expected_O = 8 * table[list(encoded.target_ids)].mean(dim=0) - table[said]
    update = next(iter(plan.updates.values()))
    torch.testing.assert_close(update.left_OR[:, 0], expected_O)


def test_a_layer_without_neurons_keeps_its_bits() -> None:
    model, editor = tiny_model("llama"), kn(threshold=1.0, refine="none")
    here = step(model, [dataclasses.replace(request(), target_old="French")])
    plan = editor.plan(here)
    assert plan.summary["neurons"] == 1
    modules = editor.modules(model)
    weights = {name: model.weight(name).clone() for name in modules}
    model.edit(modules)
    for module in modules:
        model.apply(module, editor.propose(here, module, plan))
    same = [torch.equal(model.weight(name), weights[name]) for name in modules]
    assert sorted(same) == [False, *[True] * (len(modules) - 1)]


def test_an_attribution_that_is_not_finite_is_named_and_nothing_is_written() -> None:
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.network.transformer.h[1].mlp.c_proj.weight.fill_(torch.nan)
    plan = kn().plan(step(model, [request()], CONTEXTS))
    assert plan.nonfinite == "attribution" and not plan.updates


def test_requests_without_an_old_answer_or_without_paraphrases_are_refused() -> None:
    asked = (request(), dataclasses.replace(request(1), target_old=None, paraphrases=()))
    data = LoadedDataset(name="few", requests=asked, digest="few", origin="a test")
    both = kn(refine="paraphrases").check_requests(data, asked)
    assert [problem.partition(":")[0] for problem in both] == ["editor.answer", "editor.refine"]
    assert "1 of 2 requests of few have no old answer" in both[0]
    assert "editor.answer=predicted" in both[0] and asked[1].id in both[1]
    assert kn(answer="predicted").check_requests(data, asked) == []
    with pytest.raises(ConfigError, match=r"editor\.answer: this request has no old answer"):
        kn().plan(step(tiny_model("gpt2"), asked[1:], CONTEXTS))


def test_embeddings_of_another_width_are_refused() -> None:
    model = tiny_model("gpt2")
    model.network.set_input_embeddings(torch.nn.Embedding(len(model.tokenizer), 7))
    with pytest.raises(ConfigError, match=r"editor.embeddings: .* another width .*got 7; expected"):
        kn().init(model, Moments())


def test_the_check_of_a_run_compares_the_shortcut_that_scores_take() -> None:
    found = kn().self_check(tiny_model("llama"), request())
    assert [each.shortcut for each in found] == ["search"] and found[0].agrees


def test_options_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match=r"steps:(.|\n)*add:(.|\n)*threshold:(.|\n)*layers:"):
        kn(steps=0, add=-1.0, threshold=1.2, layers=(2, 1))
