"""GRACE: the codebook against plain computations, and the traps of its ports."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.editors.codebook import Codebook
from editkit.editors.grace import Grace
from editkit.editors.replaced_output import by_network, replaced_forward
from editkit.errors import OptionError
from editkit.model.beside import NONE
from editkit.model.tokens import encode_with_targets, pad
from tests.support.helpers import Kind, request, requests, tiny_model
from tests.support.methods import noise
from tests.support.methods import step as step_of

GRACE = Grace(
    name="grace",
    layers=(1,),
    matrix="down",
    replace="last",
    radius=0.05,
    start="random",
    steps=8,
    lr=0.5,
    stop_loss=0.0,
)


def codebook(keys: torch.Tensor, *, radius: float = 1.0) -> Codebook:
    """Entries at these keys; the value of entry n is n everywhere, its answer the token n."""
    found = Codebook.empty("m", "last", (3, keys.shape[1]))
    count = len(keys)
    return replace(
        found,
        keys_NI=keys.float(),
        values_NO=torch.arange(count).float()[:, None].expand(count, 3),
        radii_N=torch.full((count,), radius),
        labels_NL=torch.arange(count)[:, None],
    )


def test_the_lookup_finds_the_nearest_key_of_all_where_a_matrix_product_alone_loses_it() -> None:
    # Keys of length 200 that are 1e-3 apart: |q - k|^2 as a sum of squares has no correct digit.
    keys_NI = (noise(2000, 48, seed=1) + 30).float()
    keys_NI[1000:] = keys_NI[:1000] + 1e-3 * noise(1000, 48, seed=2).float()
    queries_PI = keys_NI[::7] + 1e-4 * noise(286, 48, seed=3).float()
    distances_P, entries_P = codebook(keys_NI).nearest(queries_PI)
    plain_QN = (queries_PI[:, None].double() - keys_NI[None].double()).norm(dim=-1)
    assert torch.equal(entries_P, plain_QN.argmin(dim=1))
    assert torch.allclose(distances_P.double(), plain_QN.amin(dim=1), rtol=1e-2)


def test_a_prompt_is_sent_to_the_nearest_entry_only_within_the_radius_of_that_entry() -> None:
    book = replace(
        codebook(torch.tensor([[0.0, 0.0], [10.0, 0.0]])), radii_N=torch.tensor([1.0, 4.0])
    )
    queries = torch.tensor([[0.9, 0.0], [1.1, 0.0], [6.1, 0.0], [5.9, 0.0], [10.0, 0.0]])
    assert book.covering(queries).tolist() == [0, NONE, 1, NONE, 1]
    assert codebook(torch.zeros(0, 2)).covering(queries).tolist() == [NONE] * 5


def test_entries_split_grow_and_stay_apart_by_the_papers_rule() -> None:
    first, at = codebook(torch.zeros(0, 2)).placed(torch.zeros(2), (7,), torch.ones(3), radius=1.0)
    assert (at, first.radii_N.tolist()) == (0, [1.0])
    apart, at = first.placed(torch.tensor([2.5, 0.0]), (8,), torch.ones(3), radius=1.0)
    assert (at, apart.radii_N.tolist()) == (1, [1.0, 1.0]), "further away than both radii"
    split, at = first.placed(torch.tensor([1.5, 0.0]), (8,), torch.ones(3), radius=1.0)
    assert at == 1
    assert split.radii_N.tolist() == pytest.approx([0.75 - 1e-5, 0.75], abs=1e-7)
    grown, at = first.placed(torch.tensor([1.5, 0.0]), (7,), torch.ones(3), radius=1.0)
    assert (at, len(grown), grown.radii_N.tolist()) == (0, 1, [1.5])
    inside, at = first.placed(torch.tensor([0.5, 0.0]), (7,), torch.ones(3), radius=1.0)
    assert (at, len(inside), inside.radii_N.tolist()) == (0, 1, [1.0])
    assert first.radii_N.tolist() == [1.0], "a codebook is a value"


def test_a_later_answer_to_the_same_prompt_takes_the_place_of_the_earlier_one() -> None:
    first, _ = codebook(torch.zeros(0, 2)).placed(
        torch.tensor([3.0, 4.0]), (7,), torch.ones(3), radius=1.0
    )
    again, at = first.placed(torch.tensor([3.0, 4.0 + 1e-6]), (8, 9), torch.ones(3), radius=1.0)
    assert (at, len(again), again.answer(0)) == (0, 1, (8, 9))
    assert again.radii_N.tolist() == [1.0], "two entries of radius zero would reach nothing"


def test_a_codebook_that_grew_is_a_value_and_its_descendants_share_its_memory() -> None:
    grown = [codebook(torch.zeros(0, 2))]
    for number in range(40):
        key, value = torch.tensor([10.0 * number, 0.0]), torch.full((3,), float(number))
        grown.append(grown[-1].placed(key, (number, 7)[: 1 + number % 2], value, radius=1.0)[0])
    other, _ = grown[30].placed(torch.tensor([0.0, 50.0]), (1, 2, 3), torch.zeros(3), radius=1.0)
    for count, book in enumerate(grown):
        assert len(book) == count
        assert book.values_NO[:, 0].tolist() == [float(number) for number in range(count)]
        assert [book.answer(n) for n in range(count)] == [
            (n, 7)[: 1 + n % 2] for n in range(count)
        ], "another codebook that grew from the same rows changes nothing"
    assert (len(other), other.answer(30)) == (31, (1, 2, 3))
    places = {book.keys_NI.data_ptr() for book in grown[1:]}
    assert len(places) <= 4, "most of the forty share their rows"


def test_answers_are_the_same_by_their_tokens_not_by_the_mean_of_their_ids() -> None:
    first, _ = codebook(torch.zeros(0, 2)).placed(torch.zeros(2), (4, 6), torch.ones(3), radius=1.0)
    more, at = first.placed(
        torch.tensor([0.5, 0.0]), (5, 5), torch.ones(3), radius=1.0
    )  # the same mean
    assert (at, len(more)) == (1, 2)
    assert [more.answer(entry) for entry in range(2)] == [(4, 6), (5, 5)]


@pytest.mark.parametrize(
    ("kind", "replaced"), [("gpt2", "last"), ("llama", "prompt"), ("gptj", "last")]
)
def test_the_value_is_that_of_a_plain_descent(kind: Kind, replaced: str) -> None:
    model = tiny_model(kind)
    editor = replace(GRACE, replace=replaced)
    torch.manual_seed(5)
    state = editor.propose(
        step := step_of(model, [request(0)], state=editor.init(model, None)),  # type: ignore[arg-type]
        plan := editor.plan(step),
    )
    torch.manual_seed(5)
    [sequence] = encode_with_targets(model.tokenizer, [request(0).probe()])
    ids, last = list(sequence.ids[:-1]), sequence.start - 1
    value = torch.rand(model.weight(editor.modules(model)[0]).shape[0]).requires_grad_()
    adam = torch.optim.Adam([value], lr=0.5)
    keys: list[torch.Tensor] = []

    def put(_module: object, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        keys.append(args[0][0, last])
        first = last if replaced == "last" else 0
        middle = value.expand(last + 1 - first, -1)
        return torch.cat([output[0, :first], middle, output[0, last + 1 :]])[None]

    with model.module(editor.modules(model)[0]).register_forward_hook(put):
        for _ in range(editor.steps):
            logits_TV = model.network(**pad([ids]).arguments).logits[0, last:]
            loss = torch.nn.functional.cross_entropy(logits_TV, torch.tensor(sequence.target_ids))
            adam.zero_grad()
            loss.backward()
            adam.step()
    assert torch.allclose(state["values"][0], value.detach(), rtol=1e-3, atol=1e-4)
    assert torch.allclose(state["keys"][0], keys[0].detach(), rtol=1e-5, atol=1e-6)
    assert plan.summary["steps"] == editor.steps


def test_every_entry_keeps_its_own_answer_and_value_after_several_edits() -> None:
    """EasyEdit appends keys and prepends labels: from the second edit on, none fits its key."""
    model = tiny_model("gpt2")
    asked = requests(3)
    state = GRACE.init(model, None)  # type: ignore[arg-type]
    for each in asked:
        step = step_of(model, [each], state=state)
        state = GRACE.propose(step, GRACE.plan(step))
    together = step_of(model, asked, state=GRACE.init(model, None))  # type: ignore[arg-type]
    torch.manual_seed(0)
    (book,) = GRACE.attach(model, state)
    assert isinstance(book, Codebook)
    encoded = encode_with_targets(model.tokenizer, [each.probe() for each in asked])
    assert [book.answer(entry) for entry in range(3)] == [one.target_ids for one in encoded]
    assert book.covering(book.keys_NI).tolist() == [0, 1, 2]
    assert len(GRACE.plan(together).codebook) == 3, "a batch is its requests one after another"


def test_options_out_of_range_are_named_together() -> None:
    with pytest.raises(OptionError) as raised:
        replace(GRACE, layers=(0, 1), radius=0.0, steps=0, lr=-1.0, stop_loss=-0.1)
    named = [problem.partition(":")[0] for problem in raised.value.problems]
    assert named == ["radius", "steps", "lr", "layers", "stop_loss"]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj"])
@pytest.mark.parametrize("replaced", ["last", "prompt"])
@pytest.mark.parametrize("matrix", ["down", "up"])
def test_a_search_from_the_kept_part_of_a_text_is_that_of_the_whole_network(
    kind: Kind, replaced: str, matrix: str
) -> None:
    model = tiny_model(kind)
    editor = replace(GRACE, replace=replaced, matrix=matrix)
    [found] = editor.self_check(model, request(2))
    assert found.agrees and found.differences.keys() == {"loss", "gradient"}
    assert max(found.differences.values()) < 1e-4
    (module,) = editor.modules(model)
    [sequence] = encode_with_targets(model.tokenizer, [request(2).probe()])
    first = sequence.start - 1 if replaced == "last" else 0
    width = model.weight(module).shape[0]
    values = noise(2, width, seed=1).float()
    state = editor.init(model, None)  # type: ignore[arg-type]
    step = step_of(model, requests(3), state=state)
    model.attach(*editor.attach(model, editor.propose(step, editor.plan(step))))
    ours = replaced_forward(model, module, 1, request(2).probe(), sequence, first)
    plain = by_network(model, module, request(2).probe(), sequence, first)
    assert ours.__qualname__ != plain.__qualname__, "two ways"
    for value_O in values:  # beside entries that cover this very prompt
        assert float(ours(value_O)) == pytest.approx(float(plain(value_O)), abs=1e-4)
