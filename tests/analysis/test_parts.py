"""Each analysis against a plain computation, on tiny random models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editkit.analysis.base import Subject
from editkit.analysis.failures import class_of
from editkit.analysis.influence import influences
from editkit.analysis.lens import PLACES, read_lens
from editkit.analysis.objectives import log_probabilities, perplexity
from editkit.analysis.recall import Recall, final_states
from editkit.analysis.update import COLUMNS, HITS, Update
from editkit.linalg.lowrank import LowRank
from editkit.model.editable import EditableModel
from editkit.records.reader import RunRecords
from editkit.runner.checkpoint import RunState
from editkit.types import EditRequest, Probe
from tests.support.helpers import KINDS, Kind, tiny_model

REQUESTS = tuple(
    EditRequest(
        id=f"r{number}",
        prompt="The home of {} is in",
        subject=f"Item {number}",
        target=("Rome", "Paris", "Oslo")[number % 3],
        target_old="Berlin" if number else None,
        neighbours=(Probe(prompt=f"The home of Thing {number} is in", answer="Berlin"),),
    )
    for number in range(7)
)


def subject_of(model: EditableModel) -> Subject:
    """The model after an edit of two matrices that nothing ran."""
    modules = [model.family.down_projection(layer) for layer in (0, 1)]
    model.edit(modules)
    generator = torch.Generator().manual_seed(0)
    for module in modules:
        rows, columns = model.weight(module).shape
        left_OR = torch.randn(rows, 2, generator=generator)
        model.apply(module, LowRank(left_OR, torch.randn(columns, 2, generator=generator)))
    records = RunRecords(
        folder=Path("run"), steps=(), evals=(), config={}, provenance={}, status="done"
    )
    state = RunState(
        step=1,
        totals=model.totals(),
        contexts=(),
        editor={},
        solve={},
        baselines={},
        spectra={},
        base_sigma_max={},
        rng={},
    )
    return Subject(
        records=records, state=state, model=model, requests=REQUESTS, view="unrestrained"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_lens_is_the_head_on_each_hidden_state(kind: Kind) -> None:
    model = tiny_model(kind)
    readings = read_lens(model, REQUESTS)
    for request, reading in zip(REQUESTS, readings, strict=True):
        ids = model.tokenizer(request.full_prompt)["input_ids"]
        subject = len(model.tokenizer(request.full_prompt.removesuffix(" is in"))["input_ids"]) - 1
        with torch.no_grad():
            out = model.network(torch.tensor([ids]), output_hidden_states=True)
        # transformers' last hidden state has the final norm already
        norm = model.module(str(model.family.final_norm))
        states = [norm(state) for state in out.hidden_states[:-1]] + [out.hidden_states[-1]]
        for place, position in zip(PLACES, (subject, len(ids) - 1), strict=True):
            for answer in (request.target, request.target_old):
                key = "target" if answer == request.target else "target_old"
                if answer is None:
                    assert reading[place]["target_old"] is None
                    continue
                token = model.tokenizer(f"{request.full_prompt} {answer}")["input_ids"][len(ids)]
                ranks, probabilities = reading[place][key]  # type: ignore[misc]
                for layer, state in enumerate(states):
                    with torch.no_grad():
                        p_V = model.hidden_to_logits(state[0, position][None])[0].softmax(-1)
                    assert probabilities[layer] == pytest.approx(float(p_V[token]), rel=1e-3)
                    order = p_V.argsort(descending=True).tolist()
                    assert abs(order.index(token) + 1 - int(ranks[layer])) <= 1  # ties of rounding


def test_what_was_written_is_counted_by_column() -> None:
    model = tiny_model("llama")
    subject = subject_of(model)
    module = model.edited_modules[0]
    before_OI = model.base(module).clone()
    found = Update().measure(subject)["modules"][module]
    total_OI = model.weight(module) - before_OI
    norms = [float(column.norm()) for column in total_OI.T]
    assert found["column_norms"] == pytest.approx(norms, rel=1e-4)
    energy = sorted((norm**2 for norm in norms), reverse=True)
    fewest = next(
        count for count in range(1, len(energy) + 1) if sum(energy[:count]) >= sum(energy) / 2
    )
    assert found["half_in"] == fewest / len(norms)
    assert found["rank"] == 2
    top = sorted(range(len(norms)), key=lambda column: -norms[column])[:COLUMNS]
    assert [column["neuron"] for column in found["columns"]] == top
    head_VO = model.network.get_output_embeddings().weight
    for weight_OI, key in ((before_OI, "before"), (model.weight(module), "after")):
        for place, first in enumerate(HITS):
            promoted = {
                token
                for column in top
                for token in (head_VO @ weight_OI[:, column])
                .argsort(descending=True)[:first]
                .tolist()
            }
            answers = [
                model.tokenizer(f"{request.full_prompt} {request.target}")["input_ids"][
                    len(model.tokenizer(request.full_prompt)["input_ids"])
                ]
                for request in REQUESTS
            ]
            share = sum(token in promoted for token in answers) / len(answers)
            assert found[key][place] == pytest.approx(share)


def test_the_sign_of_a_vector_is_the_one_that_promotes_the_new_answers() -> None:
    model = tiny_model("llama")
    module = model.family.down_projection(0)
    model.edit([module])
    token = model.tokenizer("The home of Item 0 is in Rome")["input_ids"][
        len(model.tokenizer("The home of Item 0 is in")["input_ids"])
    ]
    head_VO = model.network.get_output_embeddings().weight.detach()
    for sign in (1.0, -1.0):
        model.reset()
        model.apply(
            module,
            LowRank(sign * head_VO[token][:, None], torch.ones(model.weight(module).shape[1], 1)),
        )
        subject = subject_like(model)
        (vector,) = Update().measure(subject)["modules"][module]["vectors"]
        assert vector["words"][0] == model.tokenizer.decode([token])


def subject_like(model: EditableModel) -> Subject:
    records = RunRecords(
        folder=Path("run"), steps=(), evals=(), config={}, provenance={}, status="done"
    )
    return Subject(
        records=records,
        state=None,  # type: ignore[arg-type]
        model=model,
        requests=REQUESTS[:1],
        view="unrestrained",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" New York.", "edited"),
        (" new york, and", "edited"),
        (" Los Angeles is", "old"),
        (" ... \n\n", "meaningless"),
        (" the the the the", "meaningless"),
        (" York and", "missing"),
        (" New Angeles", "partial"),
        (" the Angeles", "partial"),
        (" a large town", "irrelevant"),
    ],
)
def test_classes_of_failures(text: str, expected: str) -> None:
    assert class_of(text, "New York", "Los Angeles") == expected


def test_recalled_facts_are_the_final_hidden_states() -> None:
    model = tiny_model("gpt2")
    subject = subject_of(model)
    prompts = [request.full_prompt for request in REQUESTS]
    states_PD = final_states(model, prompts)
    for prompt, state_D in zip(prompts, states_PD, strict=True):
        with torch.no_grad():
            out = model.network(
                torch.tensor([model.tokenizer(prompt)["input_ids"]]), output_hidden_states=True
            )
        assert torch.allclose(out.hidden_states[-1][0, -1], state_D, atol=1e-4)
    results = Recall().measure(subject)["groups"]
    with subject.unedited():
        before_PD = final_states(model, prompts)
    assert results["edits"]["moved"] == pytest.approx(
        float((states_PD - before_PD).norm() / before_PD.norm()), rel=1e-4
    )
    assert results["edits"]["prompts"] == results["unrelated"]["prompts"] == 7
    # The components keep the distances of the two largest directions: at most the whole variance
    assert 0 < sum(results["edits"]["explained"]) <= 1.0001


def test_states_that_did_not_move_cannot_be_told_apart() -> None:
    model = tiny_model("gpt2")
    model.edit([model.family.down_projection(0)])
    found = Recall().measure(
        Subject(
            records=subject_like(model).records,
            state=None,  # type: ignore[arg-type]
            model=model,
            requests=REQUESTS,
            view="unrestrained",
        )
    )["groups"]["edits"]
    assert found["moved"] == 0
    assert found["told_apart"] <= 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_perplexity_of_targets(kind: Kind) -> None:
    model = tiny_model(kind)
    found = log_probabilities(model, REQUESTS)
    for request, values in zip(REQUESTS, found, strict=True):
        prompt = model.tokenizer(request.full_prompt)["input_ids"]
        ids = model.tokenizer(f"{request.full_prompt} {request.target}")["input_ids"]
        with torch.no_grad():
            log_p_TV = model.network(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(log_p_TV[at - 1, ids[at]]) for at in range(len(prompt), len(ids))]
        assert values == pytest.approx(expected, rel=1e-3)
    assert perplexity([-1.0, -3.0]) == pytest.approx(2.718281828**2)
    assert perplexity([-5000.0]) == float("inf")


@pytest.mark.parametrize("kind", KINDS)
def test_influences_are_derivatives_and_add_up(kind: Kind) -> None:
    model = tiny_model(kind)
    modules = [model.family.down_projection(layer) for layer in (0, 1)]
    model.edit(modules)
    generator = torch.Generator().manual_seed(2)
    blocks = []
    for place in range(3):
        block = {}
        for module in modules[: 1 + place % 2]:
            rows, columns = model.weight(module).shape
            left_OR = 0.3 * torch.randn(rows, 1, generator=generator)
            block[module] = LowRank(left_OR, torch.randn(columns, 1, generator=generator))
        blocks.append(block)
    dense = {modules[0]: 0.05 * torch.randn(model.weight(modules[0]).shape, generator=generator)}
    blocks.append(dense)
    probes = [request.neighbours[0] for request in REQUESTS[:3]]

    def values() -> torch.Tensor:
        requests = [
            EditRequest(id="", prompt=p.prompt, subject="", target=p.answer) for p in probes
        ]
        return torch.tensor([sum(of) for of in log_probabilities(model, requests)])

    before_P = values()
    for block in blocks:
        for module, update in block.items():
            model.apply(module, update)
    influence_PB = influences(model, blocks, probes, steps=24)
    changes_P = values() - before_P
    assert influence_PB.sum(dim=1).tolist() == pytest.approx(changes_P.tolist(), rel=0.02, abs=0.01)
    # One point on the path: the derivative at the middle, along each block by itself
    middle_PB = influences(model, blocks, probes, steps=1)
    totals = model.totals()
    step = 1e-2
    for place, block in enumerate(blocks):
        moved = []
        for amount in (step, -step):
            corrections = {module: -0.5 * totals[module].dense() for module in modules}
            for module, update in block.items():
                dense_OI = update.dense() if isinstance(update, LowRank) else update
                corrections[module] = corrections[module] + amount * dense_OI
            with model.temporarily(corrections):
                moved.append(values())
        slopes_P = (moved[0] - moved[1]) / (2 * step)
        assert middle_PB[:, place].tolist() == pytest.approx(slopes_P.tolist(), rel=0.02, abs=0.01)
