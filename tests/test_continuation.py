"""Going on from a block and a token gives what the whole network gives, and the same gradients."""

from __future__ import annotations

import pytest
import torch

from editkit.model.capture import add_to_output
from editkit.model.continuation import can_continue, prepare
from editkit.model.tokens import pad
from tests.helpers import KINDS, tiny_model


def whole_and_continued(kind: str, dtype: str, layer: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Hidden states from the start on of each sequence, and the gradient of a weighted sum of them with respect to what was added."""
    model = tiny_model(kind, dtype=dtype, num_layers=4)
    generator = torch.Generator().manual_seed(5)
    sequences = [tuple(torch.randint(5, 60, (length,), generator=generator).tolist()) for length in (9, 5, 12)]
    starts = [4, 0, 10]
    width = model.weight(model.family.down_projection(0)).shape[0]
    delta_BD = torch.randn(3, width, generator=generator).to(model.dtype).requires_grad_(True)

    batch = pad(sequences, device=model.device)
    with add_to_output(model, model.family.mlp(layer), batch.columns(starts), delta_BD):
        plain_BTD = model.final_hidden(batch)
    plain = [plain_BTD[row, start : len(ids)] for row, (ids, start) in enumerate(zip(sequences, starts, strict=True))]

    continuation = prepare(model, layer, sequences, starts)
    for _ in range(2):  # a step leaves nothing behind for the next
        moved_BSD = continuation.hidden_BSD.clone()
        moved_BSD[:, 0] += delta_BD
        final_BSD = continuation.run(moved_BSD)
    ours = [final_BSD[row, : len(ids) - start] for row, (ids, start) in enumerate(zip(sequences, starts, strict=True))]
    for found in (plain, ours):
        weights = [torch.linspace(-1.0, 2.0, part.numel(), dtype=part.dtype).reshape(part.shape) for part in found]
        (gradient_BD,) = torch.autograd.grad(sum((part * each).sum() for part, each in zip(found, weights, strict=True)), delta_BD)
        found.append(gradient_BD)
    return plain, ours


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_equals_the_whole_network(kind: str, layer: int) -> None:
    exact = 1e-7 if kind == "gptj" else 1e-12  # GPT-J's attention computes in float32 whatever its weights are
    for tolerance, dtype in ((1e-5, "float32"), (exact, "float64")):
        for plain, ours in zip(*whole_and_continued(kind, dtype, layer), strict=True):
            assert torch.linalg.norm(plain - ours) <= tolerance * torch.linalg.norm(plain)


def test_a_sliding_window_shorter_than_the_text_cannot_be_gone_on_with() -> None:
    model = tiny_model("llama")
    assert can_continue(model, 10_000)
    model.network.config.sliding_window = 8
    assert can_continue(model, 8) and not can_continue(model, 9)
    model.network.config.use_sliding_window = False
    assert can_continue(model, 9)


def test_the_network_is_whole_again_afterwards() -> None:
    model = tiny_model("gpt2")
    continuation = prepare(model, 1, [(3, 4, 5, 6)], [2])
    continuation.run(continuation.hidden_BSD)
    with pytest.raises(RuntimeError):
        continuation.run(continuation.hidden_BSD[:, :, :-1])  # a wrong width fails inside the network
    assert model.num_layers == len(model.network.transformer.h)
