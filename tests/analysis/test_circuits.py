"""The graph of a network, its attribution and its circuits against plain computations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from editkit.analysis.attribution import (
    Fact,
    acdc,
    attention_of_last,
    circuit,
    edge_names,
    on_paths,
    passes_of,
    require_parts,
    scores,
)
from editkit.errors import ConfigError
from editkit.model.editable import EditableModel
from editkit.model.path_passes import run
from editkit.model.paths import Graph
from tests.support.helpers import KINDS, Kind, tiny_model


def double(kind: Kind) -> tuple[EditableModel, Fact]:
    """A model in float64, and a fact of it."""
    model = tiny_model(kind)
    model.network.double()
    ids = tuple(model.tokenizer("The mother tongue of Shakira is")["input_ids"])
    return model, Fact(id="fact", ids=ids, subject=(len(ids) - 2, len(ids) - 3), answer=5, other=9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_make_the_network(kind: Kind) -> None:
    model, fact = double(kind)
    graph = Graph(model)
    passes = passes_of(graph, fact, noise=3.0, seed=0)
    with torch.no_grad():
        plain_V = model.network(torch.tensor([fact.ids])).logits[0, -1]
    assert torch.allclose(passes.clean.logits_V, plain_V, atol=1e-9)
    assert float((passes.corrupted.logits_V - plain_V).norm()) > 1e-3
    require_parts(graph, fact, passes)
    kept_RS = graph.existing_RS.double()
    with_all = run(graph, fact.ids, other=passes.corrupted, kept_RS=kept_RS)
    assert torch.allclose(with_all.logits_V, plain_V, atol=1e-9)
    without = run(graph, fact.ids, other=passes.corrupted, kept_RS=0 * kept_RS)
    assert torch.allclose(without.logits_V, passes.corrupted.logits_V, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_is_the_derivative_along_its_edge(kind: Kind) -> None:
    """Against differences of patched passes: the edge of a text as it is, mixed with a little of
    the corrupted one.
    """
    model, fact = double(kind)
    graph = Graph(model)
    passes = passes_of(graph, fact, noise=3.0, seed=0)
    score_RS = scores(graph, fact, passes, steps=1)
    kept_RS, step = graph.existing_RS.double(), 1e-3
    generator = torch.Generator().manual_seed(1)
    edges = graph.existing_RS.nonzero()
    chosen = edges[torch.randperm(len(edges), generator=generator)[:40]].tolist()
    chosen += [edge for edge in edges.tolist() if edge[0] == len(graph.readers) - 1][:5]
    kinds = {graph.readers[row].kind for row, _ in chosen}
    assert kinds == {"q", "k", "v", "m", "logits"}
    for row, source in chosen:
        values = []
        for amount in (step, -step):
            mixed_RS = kept_RS.clone()
            mixed_RS[row, source] = 1 - amount
            mixed = run(graph, fact.ids, other=passes.corrupted, kept_RS=mixed_RS)
            values.append(float(fact.value(mixed.logits_V)))
        derivative = (values[1] - values[0]) / (2 * step)
        assert float(score_RS[row, source]) == pytest.approx(
            derivative, rel=1e-3, abs=1e-3 * float(score_RS.abs().max())
        )  # norms of Llama are computed in float32


def test_integrated_gradients_add_up_at_the_logits() -> None:
    """Where the only reader is the logits, value(text) - value(corrupted) is nearly the sum of its
    scores; more steps come nearer.
    """
    model, fact = double("llama")
    graph = Graph(model)
    passes = passes_of(graph, fact, noise=1.0, seed=0)
    change = float(fact.value(passes.clean.logits_V) - fact.value(passes.corrupted.logits_V))
    errors = [
        abs(float(scores(graph, fact, passes, steps=steps)[-1].sum()) - change) for steps in (1, 40)
    ]
    assert errors[1] < errors[0]


def test_edges_off_the_paths_are_dropped() -> None:
    model, _ = double("llama")
    graph = Graph(model)
    names = {reader.name: row for row, reader in enumerate(graph.readers)}
    places = {name: place for place, name in enumerate(graph.sources)}
    kept_RS, last = torch.zeros_like(graph.existing_RS), graph.num_heads - 1
    for source, reader in (
        ("input", "m0"),
        ("m0", "logits"),
        ("a0.h1", "m1"),  # nothing reaches it
        ("input", "a1.h0<q>"),
        ("input", f"a1.h{last}<q>"),  # nothing reads it
        ("m0", "a1.h0<v>"),
        ("a1.h0", "logits"),
    ):
        kept_RS[names[reader], places[source]] = True
    left = set(edge_names(graph, on_paths(graph, kept_RS)))
    assert left == {
        *("input -> m0", "m0 -> logits", "m0 -> a1.h0<v>", "a1.h0 -> logits"),
        "input -> a1.h0<q>",  # of a head that the logits read
    }


def test_acdc_keeps_what_a_value_needs() -> None:
    """Every edge that is kept costs the threshold, and the circuit's value is near the whole."""
    model, fact = double("llama")
    graph = Graph(model)
    passes = passes_of(graph, fact, noise=3.0, seed=0)
    change = abs(float(fact.value(passes.clean.logits_V) - fact.value(passes.corrupted.logits_V)))
    sign = (
        fact
        if fact.value(passes.clean.logits_V) > fact.value(passes.corrupted.logits_V)
        else (replace(fact, answer=fact.other or 0, other=fact.answer))
    )
    kept_RS = acdc(graph, [(sign, passes)], threshold=change / 50)
    assert 0 < int(kept_RS.sum()) < int(graph.existing_RS.sum()) / 2
    assert not bool((kept_RS & ~graph.existing_RS).any())
    found = run(graph, sign.ids, other=passes.corrupted, kept_RS=kept_RS.double()).logits_V
    full, empty = (sign.value(each.logits_V) for each in (passes.clean, passes.corrupted))
    assert float((sign.value(found) - empty) / (full - empty)) > 0.5


def test_the_circuit_has_the_largest_scores() -> None:
    model, fact = double("gpt2")
    graph = Graph(model)
    passes = passes_of(graph, fact, noise=3.0, seed=0)
    score_RS = scores(graph, fact, passes, steps=2)
    kept_RS = circuit(graph, score_RS, edges=30)
    assert 0 < int(kept_RS.sum()) <= 30
    everything = circuit(graph, score_RS, edges=10**9)
    assert torch.equal(everything, graph.existing_RS)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_the_last_token(kind: Kind) -> None:
    model, fact = double(kind)
    weights_LHT = attention_of_last(model, fact.ids)
    assert weights_LHT.shape == (
        model.num_layers,
        model.network.config.num_attention_heads,
        len(fact.ids),
    )
    assert torch.allclose(weights_LHT.sum(-1), torch.ones(weights_LHT.shape[:2]).double())


def test_a_network_that_cannot_be_taken_apart_is_refused() -> None:
    model, fact = double("llama")
    graph = Graph(model)
    passes = passes_of(graph, fact, noise=3.0, seed=0)
    # An output that is scaled behind the MLP is not the sum of the parts that are noted.
    block = model.module(model.family.block(0))
    handle = block.register_forward_hook(lambda _m, _a, output: output * 1.5)
    try:
        with pytest.raises(ConfigError, match="not the sum of heads and MLPs"):
            require_parts(graph, fact, passes_of(graph, fact, noise=3.0, seed=0))
    finally:
        handle.remove()
    require_parts(graph, fact, passes)
