"""A cached suffix gives the hidden states and gradients of the whole network."""

from __future__ import annotations

import pytest
import torch

from editkit.model import shared_prefixes as prefixes
from editkit.model.cached_suffix import prepare, supports_caching
from editkit.model.capture import add_to_output
from editkit.model.editable import EditableModel
from editkit.model.families import family_of
from editkit.model.tokens import pad
from tests.model.test_families import SIZES
from tests.support.helpers import KINDS, Kind, tiny_model, tiny_tokenizer


def whole_and_cached(
    kind: Kind, dtype: str, layer: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The hidden states of each sequence from its start on, and the gradient of their weighted sum
    with respect to the added vectors.
    """
    model = tiny_model(kind, dtype=dtype, num_layers=4)
    generator = torch.Generator().manual_seed(5)
    sequences = [
        tuple(torch.randint(5, 60, (length,), generator=generator).tolist())
        for length in (9, 5, 12)
    ]
    starts = [4, 0, 10]
    width = model.weight(model.family.down_projection(0)).shape[0]
    delta_BD = torch.randn(3, width, generator=generator).to(model.dtype).requires_grad_(True)

    batch = pad(sequences, device=model.device)
    with add_to_output(model, model.family.mlp(layer), batch.columns(starts), delta_BD):
        plain_BTD = model.final_hidden(batch)
    plain = [
        plain_BTD[row, start : len(ids)]
        for row, (ids, start) in enumerate(zip(sequences, starts, strict=True))
    ]

    suffix = prepare(model, layer, sequences, starts)
    for _ in range(2):  # a step must not change the next one
        moved_BSD = suffix.hidden_BSD.clone()
        moved_BSD[:, 0] += delta_BD
        final_BSD = suffix.run(moved_BSD)
    ours = [
        final_BSD[row, : len(ids) - start]
        for row, (ids, start) in enumerate(zip(sequences, starts, strict=True))
    ]
    for states in (plain, ours):
        weights = [
            torch.linspace(-1.0, 2.0, part.numel(), dtype=part.dtype).reshape(part.shape)
            for part in states
        ]
        (gradient_BD,) = torch.autograd.grad(
            torch.stack(
                [(part * weight).sum() for part, weight in zip(states, weights, strict=True)]
            ).sum(),
            delta_BD,
        )
        states.append(gradient_BD)
    return plain, ours


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_suffix_equals_the_whole_network(kind: Kind, layer: int) -> None:
    # GPT-J's attention computes in float32 even with float64 weights.
    exact = 1e-7 if kind == "gptj" else 1e-12
    for tolerance, dtype in ((1e-5, "float32"), (exact, "float64")):
        for plain, ours in zip(*whole_and_cached(kind, dtype, layer), strict=True):
            assert torch.linalg.norm(plain - ours) <= tolerance * torch.linalg.norm(plain)


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_shared_prefixes_run_once_without_changing_results(
    monkeypatch: pytest.MonkeyPatch, kind: Kind, layer: int
) -> None:
    monkeypatch.setattr(prefixes, "LEAST_TOKENS", 1)
    model = tiny_model(kind, dtype="float64", num_layers=4)
    generator = torch.Generator().manual_seed(5)
    drawn = [
        tuple(torch.randint(5, 60, (length,), generator=generator).tolist())
        for length in (6, 3, 5, 4, 2, 7, 3)
    ]
    # Two groups with common prefixes of six and three tokens, a sequence alone in its group, and
    # two without a common prefix.
    sequences = [
        drawn[0] + drawn[2],
        drawn[1] + drawn[3],
        drawn[0] + drawn[5],
        drawn[1] + drawn[2],
        drawn[4],
        drawn[5],
        drawn[6],
    ]
    starts, groups = [8, 3, 9, 5, 1, 2, 0], [0, 1, 0, 1, 2, 3, 3]
    assert prefixes.common_lengths(sequences, starts, groups) == [6, 3, 6, 3, 0, 0, 0]
    plain, ours = (
        prepare(model, layer, sequences, starts),
        prepare(model, layer, sequences, starts, groups=groups),
    )
    kept = [5, 2, 3]
    pairs = [(plain, ours, range(7)), (plain.only(kept), ours.only(kept), kept)]
    for whole, sharing, rows in pairs:
        finals = [suffix.run(suffix.hidden_BSD + 0.1) for suffix in (whole, sharing)]
        for place, row in enumerate(rows):
            length = len(sequences[row]) - starts[row]
            one, other = (final_BSD[place, :length] for final_BSD in finals)
            assert torch.linalg.norm(one - other) <= (
                1e-6 if kind == "gptj" else 1e-12
            ) * torch.linalg.norm(one)
    assert ours.prefix[0][0].shape[2] == 6 + 3 and plain.prefix[0][0].shape[2] == 9, (
        "six shared columns, three of their own"
    )


def test_a_sliding_window_shorter_than_the_text_does_not_support_caching() -> None:
    model = tiny_model("llama")
    assert supports_caching(model, 10_000)
    model.network.config.sliding_window = 8
    assert supports_caching(model, 8) and not supports_caching(model, 9)
    model.network.config.use_sliding_window = False
    assert supports_caching(model, 9)


def test_the_network_is_restored_afterwards() -> None:
    model = tiny_model("gpt2")
    suffix = prepare(model, 1, [(3, 4, 5, 6)], [2])
    suffix.run(suffix.hidden_BSD)
    with pytest.raises(RuntimeError):
        suffix.run(suffix.hidden_BSD[:, :, :-1])  # a wrong width fails inside the network
    assert model.num_layers == len(model.network.transformer.h)


@pytest.mark.parametrize(
    "model_type", ["gemma2", "gemma3_text", "mistral", "qwen2", "qwen3", "gpt_neox"]
)
def test_every_family_supports_caching_and_layers_keep_their_kind(model_type: str) -> None:
    # Gemma 3's layers differ in their rotary base, so a block must keep its own layer type.
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SIZES | {"num_hidden_layers": 7})
    model = EditableModel(
        AutoModelForCausalLM.from_config(config),
        tiny_tokenizer("gpt2"),
        name=model_type,
        family=family_of(model_type),
    )
    sequences, starts = [(5, 9, 12, 40, 7), (6, 8, 33)], [3, 1]
    for layer in (1, 3, 6):
        batch = pad(sequences)
        with torch.no_grad():
            whole_BTD = model.final_hidden(batch)
            suffix = prepare(model, layer, sequences, starts)
            ours_BSD = suffix.run(suffix.hidden_BSD)
            for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
                torch.testing.assert_close(
                    ours_BSD[row, : len(ids) - start],
                    whole_BTD[row, start : len(ids)],
                    rtol=1e-4,
                    atol=1e-5,
                )
            torch.testing.assert_close(model.final_hidden(batch), whole_BTD, rtol=0, atol=0)
