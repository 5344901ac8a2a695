"""The loss of a vector that takes the place of a matrix's output at some tokens of one text, or of
vectors that are added to a module's outputs there.

The blocks below the matrix's and the tokens before the first replaced one stay the same, so they
run once: each call runs the rest. Where a network or its sides do not allow it, each call runs the
whole network.

Shape letters: M tokens of the answer, T tokens, S tokens from the first replaced one on, D residual
width, O output width of the matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from editkit.editors.codebook import Codebook
from editkit.editors.ft import answers_log_probabilities
from editkit.lazy import torch
from editkit.model import cached_suffix
from editkit.model.beside import Routing
from editkit.model.capture import change_outputs
from editkit.model.shortcuts import Comparison, attempted, compared

if TYPE_CHECKING:
    from editkit.model.beside import AbstractSide
    from editkit.model.editable import EditableModel
    from editkit.model.tokens import TargetSequence
    from editkit.types import Probe

# The mean log-probability of the answer's tokens, for a vector (O,). Gradients flow.
Forward = Callable[["torch.Tensor"], "torch.Tensor"]
# The outputs of one text with a value at the tokens from the first number on, before the second.
Put = Callable[["torch.Tensor", int, int, "torch.Tensor"], "torch.Tensor"]


def replaced(value_O: torch.Tensor, first: int, after: int, outputs: torch.Tensor) -> torch.Tensor:
    """Outputs of one text, (1, T, O), or (T, O) in networks that drop the rows, with the vector at
    the tokens from `first` on and before `after`.
    """
    moved = outputs.clone()
    moved.view(-1, len(value_O))[first:after] = value_O.to(outputs)
    return moved


def added(values_MO: torch.Tensor, first: int, after: int, outputs: torch.Tensor) -> torch.Tensor:
    """Outputs of one text with these vectors added at the tokens that predict its answer, which end
    the text: the first of them is the one before `after`.
    """
    moved = outputs.clone()
    rows = moved.view(-1, values_MO.shape[1])
    rows[after - 1 :] = rows[after - 1 :] + values_MO.to(outputs)
    return moved


def replaced_forward(
    model: EditableModel,
    module: str,
    layer: int,
    probe: Probe,
    sequence: TargetSequence,
    first: int,
    *,
    kind: type[AbstractSide] = Codebook,
    put: Put = replaced,
) -> Forward:
    """The forward for the tokens from `first` to the prompt's last one, in block `layer`.

    Args:
        kind: of sides that change no outputs here but those that `put` changes.
    """
    is_own = all(isinstance(side, kind) and side.module == module for side in model.sides)
    allowed = model.shortcuts.allows("search") and layer > 0 and is_own
    if allowed and cached_suffix.supports_caching(model, len(sequence.ids)):
        return by_suffix(model, module, layer, sequence, first, put)
    return by_network(model, module, probe, sequence, first, put)


def by_network(
    model: EditableModel,
    module: str,
    probe: Probe,
    sequence: TargetSequence,
    first: int,
    put: Put = replaced,
) -> Forward:
    """The whole network in every call."""
    run = answers_log_probabilities(model, [probe])

    def forward(value_O: torch.Tensor) -> torch.Tensor:
        change = partial(put, value_O, first, sequence.start)
        with change_outputs(model, {module: change}):
            return run().mean()

    return forward


def by_suffix(
    model: EditableModel,
    module: str,
    layer: int,
    sequence: TargetSequence,
    first: int,
    put: Put = replaced,
) -> Forward:
    """The tokens from `first` on, through the blocks from `layer` on."""
    # Without a routing no side acts: those beside this matrix change outputs that are replaced.
    with model.routed(Routing(None)):
        suffix = cached_suffix.prepare(model, layer - 1, [sequence.ids[:-1]], [first])
    targets_M = torch.tensor(sequence.target_ids, device=model.device)
    last = sequence.start - 1 - first

    def forward(value_O: torch.Tensor) -> torch.Tensor:
        change = partial(put, value_O, 0, last + 1)
        with model.routed(Routing(None)), change_outputs(model, {module: change}):
            hidden_SD = suffix.run(suffix.hidden_BSD)[0]
        read_MD = hidden_SD[last : last + len(targets_M)]
        log_p_MV = model.hidden_to_logits(read_MD).float().log_softmax(dim=-1)
        return log_p_MV.gather(1, targets_M[:, None]).mean()

    return forward


def compare_replaced(
    model: EditableModel,
    module: str,
    layer: int,
    probe: Probe,
    sequence: TargetSequence,
    first: int,
    *,
    shape: Sequence[int],
    put: Put = replaced,
) -> list[Comparison]:
    """The loss of a value of this shape and its gradient, by the suffix and by the whole network.
    Nothing if searches run the whole network anyway.
    """
    supported = cached_suffix.supports_caching(model, len(sequence.ids))
    if layer == 0 or not supported or not model.shortcuts.allows("search"):
        return []
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(*shape, generator=generator).to(model.device)

    def results(forward: Callable[[], Forward]) -> dict[str, torch.Tensor]:
        with torch.enable_grad():
            moved = value.clone().requires_grad_()
            loss = -forward()(moved)
            (gradient,) = torch.autograd.grad(loss, moved)
        return {"loss": loss.detach()[None], "gradient": gradient.flatten()[None]}

    ours = partial(by_suffix, model, module, layer, sequence, first, put)
    plain = partial(by_network, model, module, probe, sequence, first, put)
    found = compared("search", attempted(partial(results, ours)), results(plain), dtype=model.dtype)
    return [found]
