"""SERAC: the counterfactual model by hand, the scope, the soft mixture, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from editkit.api.session import Session
from editkit.editors.scoped_memory import ScopedMemory, copy_of, similarities
from editkit.editors.serac import ScopeOptions, Serac
from editkit.errors import ConfigError, OptionError
from editkit.evaluation.scoring.teacher_forcing import score
from editkit.model.beside import Attached
from editkit.model.editable import EditableModel
from editkit.model.side_routes import routed
from editkit.model.tokens import encode, encode_prompts, encode_with_targets
from editkit.types import Probe
from tests.support.helpers import Kind, request, requests, tiny_model
from tests.support.sides import assert_each_sequence_is_routed_by_itself

TRAIN = ScopeOptions(
    width=4,
    head_scale=0.5,
    steps=4,
    lr=1e-3,
    lr_head=1e-2,
    edit_weight=1.0,
    locality_weight=1.0,
    accumulate=2,
    clip=1e9,
    validate_every=2,
    patience=100,
    validation=2,
    held_apart=3,
    locality_texts=2,
)
SERAC = Serac(
    name="serac",
    pair="untrained",
    counterfactual=None,
    encoder="embeddings",
    threshold=0.5,
    cosine=0.9,
    mixture="hard",
    fact="{}\n",
    train=TRAIN,
)


def edited(kind: Kind, editor: Serac = SERAC) -> tuple[EditableModel, ScopedMemory]:
    model = tiny_model(kind)
    session = Session(model, editor)
    for each in requests(3):
        session.edit(each)
    [side] = model.sides
    assert isinstance(side, ScopedMemory)
    return model, side


def change(model: EditableModel, side: ScopedMemory) -> None:
    """Makes the counterfactual model another one than the base."""
    side.network.get_submodule(model.family.final_norm).weight.data.mul_(-1.5)


def plain_log_probs(model: EditableModel, network: torch.nn.Module, ids: Sequence[int]):  # type: ignore[no-untyped-def]
    logits = network(torch.tensor([list(ids)])).logits[0]  # type: ignore[operator]
    return logits.detach().log_softmax(-1)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj"])
def test_in_scope_the_counterfactual_models_logits_stand_in_for_the_networks(kind: Kind) -> None:
    model, side = edited(kind)
    change(model, side)
    probe = request(0).probe()
    [sequence] = encode_with_targets(model.tokenizer, [probe])
    [before] = encode(model.tokenizer, ["The mother tongue of Danielle Darrieux is English\n"])
    own = sequence.ids[1:] if kind == "llama" else sequence.ids  # one start token is enough
    log_p_TV = plain_log_probs(model, side.network, (*before.ids, *own[:-1]))
    expected = [
        float(log_p_TV[place, token])
        for place, token in zip(
            range(-len(sequence.target_ids), 0), sequence.target_ids, strict=True
        )
    ]
    found = score(model, [probe], tokens_per_batch=64)[probe]
    assert found.log_probs == pytest.approx(expected, abs=1e-4)
    logits_V = model.network(torch.tensor([sequence.ids[: sequence.start]])).logits[0, -1]
    assert float(logits_V.log_softmax(-1)[sequence.target_ids[0]]) == pytest.approx(
        expected[0], abs=1e-4
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj"])
@pytest.mark.parametrize("mixture", ["hard", "soft"])
def test_each_sequence_is_routed_by_itself(kind: Kind, mixture: str) -> None:
    model, side = edited(kind, replace(SERAC, mixture=mixture, cosine=0.97))  # type: ignore[arg-type]
    assert_each_sequence_is_routed_by_itself(model)
    assert model.sides == (side,)


def test_soft_is_a_mixture_of_the_two_distributions() -> None:
    model, side = edited("gpt2", replace(SERAC, mixture="soft"))
    change(model, side)
    probe = Probe(prompt="The mother tongue of Léon Blum is", answer="French")
    [sequence] = encode_with_targets(model.tokenizer, [probe])
    ids = sequence.ids[: sequence.start]
    [answered] = side.answers([ids], model.tokenizer)
    assert answered is not None and 0 < answered.share < 1
    own_V = plain_log_probs(model, side.network, (*answered.before, *ids))[-1]
    found = score(model, [probe], tokens_per_batch=64)[probe].log_probs[0]
    model.attach()
    base_V = plain_log_probs(model, model.network, ids)[-1]
    token = sequence.target_ids[0]
    share = answered.share
    expected = torch.log(share * own_V[token].exp() + (1 - share) * base_V[token].exp())
    assert found == pytest.approx(float(expected), abs=1e-4)


def test_out_of_scope_the_numbers_are_those_of_the_unedited_model_bit_for_bit() -> None:
    model, side = edited("gpt2", replace(SERAC, cosine=1.0 - 1e-6))
    asked = [Probe(prompt="What does Shakira play", answer="The guitar"), request(1).probe()]
    rows = encode_prompts(model.tokenizer, [probe.prompt for probe in asked])
    assert routed(model, rows) == [False, True]
    alone = [score(model, [probe], tokens_per_batch=64)[probe].log_probs for probe in asked]
    model.attach()
    plain = [score(model, [probe], tokens_per_batch=64)[probe].log_probs for probe in asked]
    assert alone[0] == plain[0] and alone[1] != plain[1]
    model.attach(replace(side, edits=(), keys_NF=side.keys_NF[:0]))
    assert routed(model, rows) == [False, False]


def test_similarities_are_the_cosine_or_by_the_heads_distance() -> None:
    features_PF, keys_NF = torch.eye(3)[:2], torch.eye(3)
    head_WF = torch.tensor([[1.0, 0.0, 2.0]])
    assert torch.equal(similarities(features_PF, keys_NF, torch.zeros(0, 0)), features_PF)
    found = similarities(features_PF, keys_NF, head_WF)
    expected = (-torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 4.0]])).exp()
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_memory_as_a_value_gives_the_same_logits(kind: Kind) -> None:
    model, side = edited(kind)
    [ids] = encode_prompts(model.tokenizer, [request(0).full_prompt])
    with torch.no_grad():
        logits = model.network(torch.tensor([ids])).logits
        model.attach()
        before, state = torch.get_rng_state(), side.state()
        again = ScopedMemory.restored(side.options(), state)
        assert torch.equal(torch.get_rng_state(), before)
        network = copy_of(model.network)
        Attached(network, model.family.base, [again], model.tokenizer)
        assert torch.equal(network(torch.tensor([ids])).logits, logits)
        assert not torch.equal(model.network(torch.tensor([ids])).logits, logits)


def test_a_later_edit_of_the_same_prompt_takes_the_place_of_an_earlier_one() -> None:
    model = tiny_model("gpt2")
    session = Session(model, SERAC)
    session.edit(requests(2))
    result = session.edit(replace(request(0), target="Occitan"))
    assert result.side is not None and result.side["entries"] == 2
    [side] = model.sides
    assert isinstance(side, ScopedMemory)
    assert [edit.fact.rpartition(" ")[2] for edit in side.edits] == ["Paris", "Occitan"]
    session.undo()
    assert model.sides[0].figures()["entries"] == 2


def test_what_does_not_work_is_refused_by_name() -> None:
    with pytest.raises(OptionError) as raised:
        replace(SERAC, cosine=float("nan"), fact="x", encoder="bm25")
    named = [problem.partition(":")[0] for problem in raised.value.problems]
    assert named == ["cosine", "fact", "encoder"]
    with pytest.raises(ConfigError, match=r"editor\.counterfactual: .* another tokenizer"):
        Session(tiny_model("gpt2"), replace(SERAC, counterfactual="asset:tiny-gpt2"))
    with pytest.raises(ConfigError, match="exceed the counterfactual model's context length"):
        Session(tiny_model("gpt2"), SERAC).edit(replace(request(0), target="x " * 35))
