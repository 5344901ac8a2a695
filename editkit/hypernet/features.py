"""One backward pass for a mini-batch of requests: the input and the gradient of every edited matrix
at the positions that predict the targets' tokens.

The loss is the mean of -log p over all target tokens of the mini-batch, as in MALMEN, RLEdit and
UltraEdit. A row's gradients therefore depend on how many target tokens the mini-batch has.

Shape letters: B rows, T tokens, P (row, position) pairs, O d_out, I d_in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from editkit.hypernet.abstract import Factors
from editkit.hypernet.factors import Questions, log_probabilities, questions
from editkit.lazy import torch
from editkit.model.capture import capture_for_gradients
from editkit.model.tokens import encode_with_targets

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel
    from editkit.types import EditRequest


def target_features(
    model: EditableModel, modules: Sequence[str], batch: Questions
) -> tuple[dict[str, Factors], torch.Tensor]:
    """By matrix, the inputs (P, I) and the gradients of the outputs (P, O) at the target positions,
    float32; and log p of each row's target, (B,), a mean over its tokens in nats.
    """
    with torch.enable_grad(), capture_for_gradients(model, modules) as captured:
        log_p_B, _ = log_probabilities(model, batch)
        lengths_B = torch.tensor(batch.lengths, device=log_p_B.device)
        loss = -(log_p_B * lengths_B).sum() / lengths_B.sum()
        gradients = torch.autograd.grad(loss, [captured.outputs[module] for module in modules])
    places = batch.rows_P, batch.columns_P
    return {
        module: Factors(captured.inputs[module][places].float(), gradient_BTO[places].float())
        for module, gradient_BTO in zip(modules, gradients, strict=True)
    }, log_p_B.detach()


def requests_features(
    model: EditableModel,
    modules: Sequence[str],
    requests: Sequence[EditRequest],
    mini_batch: int,
) -> tuple[dict[str, Factors], torch.Tensor]:
    """As `target_features`, of requests in passes of `mini_batch`."""
    found, log_p = list[dict[str, Factors]](), []
    for start in range(0, len(requests), mini_batch):
        probes = [each.probe() for each in requests[start : start + mini_batch]]
        texts = questions(model, encode_with_targets(model.tokenizer, probes, chat=model.chat))
        features, log_p_B = target_features(model, modules, texts)
        found.append(features)
        log_p.append(log_p_B)
    by_module = {module: joined(part[module] for part in found) for module in modules}
    return by_module, torch.cat(log_p)


def joined(parts: Iterable[Factors]) -> Factors:
    """The tokens of several mini-batches in their order."""
    parts = tuple(parts)
    return Factors(
        torch.cat([part.inputs_NI for part in parts]),
        torch.cat([part.gradients_NO for part in parts]),
    )
