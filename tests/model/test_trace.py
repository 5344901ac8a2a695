"""Causal tracing: the batched computation equals a plain loop, and the bundled model stores its
facts in the lower layers.
"""

from __future__ import annotations

import pytest
import torch

from editkit.config.compose import compose
from editkit.config.parts import Parts
from editkit.datasets.base import AbstractDataset
from editkit.errors import ConfigError
from editkit.evaluation.known import known_facts_of
from editkit.model.editable import EditableModel
from editkit.model.load import ModelConfig
from editkit.model.trace import Fact, Trace, trace
from tests.support.helpers import Kind, requests, tiny_model


def facts_of(model: EditableModel) -> list[Fact]:
    """Sequences of different lengths, with subjects at the start and inside."""
    return [
        Fact(ids=(5, 6, 7, 8, 9), subject=(1, 2), token=11),
        Fact(ids=(20, 21, 22), subject=(0,), token=12),
        Fact(ids=(30, 31, 32, 33, 34, 35, 36), subject=(2, 3, 4), token=13),
    ]


def plain(
    model: EditableModel, facts: list[Fact], *, window: int, noise: float, draws: int
) -> Trace:
    """The same effects from one forward pass per fact, draw and layer, with separate hooks."""
    embedding = model.network.get_input_embeddings()
    scale = noise * float(embedding.weight.float().std())
    generator = torch.Generator().manual_seed(0)
    mlps = [model.module(model.family.mlp(layer)) for layer in range(model.num_layers)]
    clean, corrupted, restored = [], [], []
    for fact in facts:
        states: list[torch.Tensor] = []

        def keep(
            _m: object,
            _a: object,
            out: torch.Tensor,
            fact: Fact = fact,
            states: list[torch.Tensor] = states,
        ) -> None:
            states.append(out[0, fact.subject[-1]].clone())

        hooks = [mlp.register_forward_hook(keep) for mlp in mlps]
        ids = torch.tensor([fact.ids])
        clean.append(float(model.network(ids).logits[0, -1].softmax(-1)[fact.token]))
        for handle in hooks:
            handle.remove()
        noises = scale * torch.randn(
            draws, len(fact.subject), embedding.weight.shape[1], generator=generator
        )

        def probability(
            noise_KD: torch.Tensor,
            layers: list[int],
            fact: Fact = fact,
            states: list[torch.Tensor] = states,
        ) -> float:
            def corrupt(_module: object, _args: object, out: torch.Tensor) -> torch.Tensor:
                out = out.clone()
                for index, position in enumerate(fact.subject):
                    out[0, position] += noise_KD[index]
                return out

            def restore(layer: int) -> object:
                def put(_module: object, _args: object, out: torch.Tensor) -> torch.Tensor:
                    out = out.clone()
                    out[0, fact.subject[-1]] = states[layer]
                    return out

                return put

            handles = [
                embedding.register_forward_hook(corrupt),
                *(mlps[layer].register_forward_hook(restore(layer)) for layer in layers),
            ]
            value = float(
                model.network(torch.tensor([fact.ids])).logits[0, -1].softmax(-1)[fact.token]
            )
            for handle in handles:
                handle.remove()
            return value

        def around(layer: int) -> list[int]:
            return [
                other
                for other in range(len(mlps))
                if layer - (window - 1) // 2 <= other <= layer + window // 2
            ]

        corrupted.append([probability(noise_KD, []) for noise_KD in noises])
        restored.append(
            [
                [probability(noise_KD, around(layer)) for layer in range(len(mlps))]
                for noise_KD in noises
            ]
        )
    return Trace(
        num_requests=len(facts),
        facts=tuple(facts),
        window=window,
        clean_N=torch.tensor(clean),
        corrupted_NS=torch.tensor(corrupted),
        restored_NSL=torch.tensor(restored),
    )


@pytest.mark.parametrize(("kind", "window"), [("gpt2", 1), ("llama", 2)])
def test_all_layers_at_once_equal_one_pass_per_layer(kind: Kind, window: int) -> None:
    model = tiny_model(kind)
    facts = facts_of(model)
    with torch.no_grad():
        expected = plain(model, facts, window=window, noise=3.0, draws=2)
    effects = trace(
        model, facts, num_requests=3, window=window, noise=3.0, draws=2, tokens_at_once=10
    )
    for name in ("clean_N", "corrupted_NS", "restored_NSL"):
        torch.testing.assert_close(
            getattr(effects, name), getattr(expected, name), rtol=1e-4, atol=1e-6
        )
    assert effects.average_L.abs().max() > 1e-5
    assert effects.average_L.shape == effects.error_L.shape == (model.num_layers,)


def test_without_noise_all_effects_are_zero() -> None:
    model = tiny_model("gpt2")
    effects = trace(model, facts_of(model), num_requests=3, noise=0.0)
    assert abs(effects.total_effect) < 1e-6
    assert float(effects.average_L.abs().max()) < 1e-6


def test_the_hooks_are_removed_afterwards() -> None:
    model = tiny_model("llama")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model.network(ids).logits
        trace(model, facts_of(model), num_requests=3)
        assert torch.equal(model.network(ids).logits, before)


def test_a_bundled_model_knows_its_facts_and_stores_them_in_lower_layers() -> None:
    model = ModelConfig(id="asset:tiny-gptj").load("cpu")
    dataset = Parts(compose([]).config, {}).one("dataset", AbstractDataset)
    assert dataset is not None
    selected = dataset.load(0).requests[:8]
    facts = known_facts_of(model, selected)
    assert len(facts) >= 7
    effects = trace(model, facts, num_requests=len(selected), draws=1)
    assert effects.total_effect > 0.5
    assert effects.peak <= 1
    assert effects.rome_layer >= 2 and effects.memit_layers[-1] == effects.rome_layer


def effects_of(*average: float) -> Trace:
    """A trace with these average indirect effects."""
    return Trace(
        num_requests=1,
        facts=(Fact(ids=(1, 2), subject=(0,), token=3),),
        window=1,
        clean_N=torch.ones(1),
        corrupted_NS=torch.zeros(1, 1),
        restored_NSL=torch.tensor([[average]]),
    )


@pytest.mark.parametrize(
    ("average", "peak", "rome", "memit"),
    [
        ((0.9, 0.5, 0.1, 0.2, 0.3, 0.2, 0.1, 0.8), 0, 4, (2, 3, 4)),  # a peak at the embeddings
        ((0.1, 0.9, 0.2, 0.1, 0.0, 0.0, 0.0, 0.0), 1, 2, (2,)),
        ((0.1, 0.2, 0.1, 0.1, 0.2, 0.1, 0.2, 0.7, 0.3, 0.9), 7, 7, (3, 4, 5, 6, 7)),
        ((0.9, 0.1, 0.2), 0, 1, (1,)),  # so few layers that only the first can be left out
        ((0.9, 0.1), 0, 0, (0,)),
    ],
)
def test_the_peak_is_reported_and_the_suggestion_lies_beyond_the_first_two_layers(
    average: tuple[float, ...], peak: int, rome: int, memit: tuple[int, ...]
) -> None:
    effects = effects_of(*average)
    assert (effects.peak, effects.rome_layer, effects.memit_layers) == (peak, rome, memit)


def test_a_model_that_knows_no_fact_is_refused() -> None:
    with pytest.raises(ConfigError, match="--trace: tiny-gpt2 knows none of the 3 facts"):
        known_facts_of(tiny_model("gpt2"), requests(3))
