"""A direct implementation of the published algorithms. Only benchmarks run it.

It computes what the published code computes. Every optimisation step is a forward pass of all
tokens through all layers, with logits over the whole vocabulary at every position. Requests are
processed one at a time, and keys and outputs are read from complete passes. The least-squares
problem is a dense solve of d_in^3 in float64. Every matrix has its own pass over the corpus.
Records are scored one at a time.

Shape letters: B sequences, C contexts, T tokens, V vocabulary, O d_out, I d_in, N requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.capture import add_to_output, capture
from editkit.model.tokens import (
    PromptBatch,
    encode,
    encode_with_targets,
    fill,
    pad,
    subject_position,
)
from editkit.targets.sequences import essence_of
from editkit.targets.settings import TargetSettings
from editkit.types import EditRequest, Probe

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

DOCUMENTS_AT_ONCE = 100  # documents of the corpus that are sorted by length together

# Requests and contexts -> the update (O, I) of each matrix.
Edit = Callable[["tuple[EditRequest, ...]", "tuple[str, ...]"], "Mapping[str, torch.Tensor]"]

# Keys (I, N) and residuals (O, N) of a module in float64 -> its update (O, I).
Solve = Callable[[str, "torch.Tensor", "torch.Tensor"], "torch.Tensor"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReferenceTarget:
    """delta, and the output of the site without it."""

    delta_O: torch.Tensor
    initial_O: torch.Tensor


def logits_of(model: EditableModel, batch: PromptBatch) -> torch.Tensor:
    """The logits of all positions, (B, T, V)."""
    logits_BTV: torch.Tensor = model.network(**batch.arguments, use_cache=False).logits
    return logits_BTV


def search_target(
    model: EditableModel,
    request: EditRequest,
    *,
    site: str,
    contexts: Sequence[str],
    settings: TargetSettings,
) -> ReferenceTarget:
    """The search of `targets.search`, with its loss computed from the full logits."""
    filled = [fill(request.prompt, request.subject, context=context) for context in contexts]
    probes = [request.probe(prompt=prompt.text) for prompt in filled]
    encoded = [encode_with_targets(model.tokenizer, [probe])[0] for probe in probes]
    essence = essence_of(request)
    essence_encoded = encode(model.tokenizer, [essence.text])[0]
    batch = pad(
        [*(sequence.ids[:-1] for sequence in encoded), essence_encoded.ids], device=model.device
    )
    kl_site = subject_position(essence_encoded, essence)
    sites = [
        *(
            subject_position(sequence, prompt)
            for sequence, prompt in zip(encoded, filled, strict=True)
        ),
        kl_site,
    ]
    target_BT = torch.full_like(batch.ids_BT[:-1], -1)
    for row, sequence in enumerate(encoded):
        target_BT[row, sequence.predicting] = torch.tensor(sequence.target_ids, device=model.device)
    is_target_BT = target_BT >= 0
    wide = torch.promote_types(model.dtype, torch.float32)
    delta_O = torch.zeros(
        model.network.config.hidden_size, dtype=wide, device=model.device
    ).requires_grad_()
    initial_O = kl_first_V = adam = None
    size = 0.0
    for step in range(settings.steps):
        first = capture(model, outputs=[site], stop_after_last=False)
        with (
            first as captured,
            add_to_output(model, site, batch.columns(sites), delta_O),
        ):  # captured before delta is added
            logits_BTV = logits_of(model, batch)
        log_p_BTV = logits_BTV.to(wide).log_softmax(-1)
        token_log_p_BT = log_p_BTV[:-1].gather(2, target_BT.clamp(min=0)[..., None])[..., 0]
        likelihood = ((token_log_p_BT * is_target_BT).sum(1) / is_target_BT.sum(1)).mean()
        kl_V = log_p_BTV[-1, kl_site]
        if initial_O is None or kl_first_V is None or adam is None:
            initial_O, kl_first_V = (
                captured.outputs[site][0, sites[0]].detach().to(wide),
                kl_V.detach(),
            )
            size = float(torch.linalg.vector_norm(initial_O))
            lr = settings.lr * (
                size / len(initial_O) ** 0.5 if settings.lr_unit == "relative" else 1.0
            )
            adam = torch.optim.Adam([delta_O], lr=lr)
        kl = torch.nn.functional.kl_div(kl_first_V, kl_V, reduction="sum", log_target=True)
        loss = (
            -likelihood
            + settings.kl_factor * kl
            + settings.weight_decay * torch.linalg.vector_norm(delta_O) / size**2
        )
        if loss.item() < settings.stop_loss or step == settings.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        length = float(torch.linalg.vector_norm(delta_O.detach()))
        if length > settings.clamp * size:
            with torch.no_grad():
                delta_O.mul_(settings.clamp * size / length)
    assert initial_O is not None
    return ReferenceTarget(delta_O=delta_O.detach(), initial_O=initial_O)


def at_subject(
    model: EditableModel, request: EditRequest, contexts: Sequence[str], *, module: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The input (C, I) and output (C, O) of a module at the subject's last token in float64, from a
    complete pass with logits.
    """
    filled = [fill(request.prompt, request.subject, context=context) for context in contexts]
    encoded = [encode(model.tokenizer, [prompt.text])[0] for prompt in filled]
    batch = pad([sequence.ids for sequence in encoded], device=model.device)
    with (
        torch.no_grad(),
        capture(model, inputs=[module], outputs=[module], stop_after_last=False) as captured,
    ):
        logits_of(model, batch)
    rows_C = torch.arange(len(contexts), device=model.device)
    columns_C = batch.columns(
        [
            subject_position(sequence, prompt)
            for sequence, prompt in zip(encoded, filled, strict=True)
        ]
    )
    return captured.inputs[module][rows_C, columns_C].double(), captured.outputs[module][
        rows_C, columns_C
    ].double()


def rome(
    model: EditableModel,
    request: EditRequest,
    *,
    layer: int,
    contexts: Sequence[str],
    settings: TargetSettings,
    inverse_II: torch.Tensor,
) -> torch.Tensor:
    """The update of one edit with averaged keys. `inverse_II` is the inverse of the second moment,
    computed once per run as in the published code.
    """
    keys_CI, outputs_CO = at_subject(
        model, request, contexts, module=model.family.down_projection(layer)
    )
    target = search_target(
        model, request, site=model.family.mlp(layer), contexts=contexts, settings=settings
    )
    key_I = keys_CI.mean(dim=0)
    direction_I = inverse_II @ key_I
    left_O = (target.initial_O + target.delta_O).double() - outputs_CO.mean(dim=0)
    return torch.outer(left_O / (key_I @ direction_I), direction_I)


def memit(
    model: EditableModel,
    requests: Sequence[EditRequest],
    *,
    layers: Sequence[int],
    contexts: Sequence[str],
    weights_C: torch.Tensor,
    settings: TargetSettings,
    solve: Solve,
) -> dict[str, torch.Tensor]:
    """The update of each layer, computed layer by layer. The weights are restored at the end, as in
    the published code.
    """
    site = model.family.block(layers[-1])
    targets = [
        search_target(model, request, site=site, contexts=contexts, settings=settings)
        for request in requests
    ]
    targets_ON = torch.stack(
        [target.initial_O + target.delta_O for target in targets], dim=1
    ).double()
    updates: dict[str, torch.Tensor] = {}
    before: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(layers):
        module = model.family.down_projection(layer)
        keys_IN = torch.stack(
            [
                weights_C @ at_subject(model, request, contexts, module=module)[0]
                for request in requests
            ],
            dim=1,
        )
        current_ON = torch.stack(
            [at_subject(model, request, contexts[:1], module=site)[1][0] for request in requests],
            dim=1,
        )
        updates[module] = solve(module, keys_IN, (targets_ON - current_ON) / (len(layers) - index))
        weight_OI = model.weight(module)
        before[module] = weight_OI.clone()
        with torch.no_grad():
            weight_OI.copy_(weight_OI.double() + updates[module])
    with torch.no_grad():
        for module, weight_OI in before.items():
            model.weight(module).copy_(weight_OI)
    return updates


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseSolve:
    """MEMIT's R K^T (prior + K K^T)^-1 as a dense solve in float64. With `remembers` it is D4S's,
    which includes the keys of earlier edits.
    """

    prior_II: torch.Tensor  # lambda C
    remembers: bool
    history: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(
        self, module: str, keys_IN: torch.Tensor, residuals_ON: torch.Tensor
    ) -> torch.Tensor:
        gram_II = keys_IN @ keys_IN.T
        if self.remembers:
            gram_II = self.history[module] = (
                self.history[module] + gram_II if module in self.history else gram_II
            )
        result: torch.Tensor = residuals_ON @ torch.linalg.solve(self.prior_II + gram_II, keys_IN).T
        return result


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseAlphaEdit:
    """R K^T P ((G + K K^T) P + l2 I)^-1 as in the published code, but in float64 instead of
    float32.
    """

    projector_II: torch.Tensor
    l2: float
    history: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(
        self, module: str, keys_IN: torch.Tensor, residuals_ON: torch.Tensor
    ) -> torch.Tensor:
        gram_II = keys_IN @ keys_IN.T
        self.history[module] = self.history[module] + gram_II if module in self.history else gram_II
        system_II = self.projector_II @ self.history[module]
        system_II.diagonal().add_(self.l2)
        result: torch.Tensor = torch.linalg.solve(
            system_II, self.projector_II @ keys_IN @ residuals_ON.T
        ).T
        return result


def second_moment(
    model: EditableModel,
    module: str,
    texts: Sequence[str],
    *,
    context_length: int,
    batch_tokens: int,
    stop: bool = True,
) -> torch.Tensor:
    """E[k k^T] of one matrix with float32 sums, from its own pass.

    Args:
        stop: whether the pass stops at the matrix.
    """
    size = model.weight(module).shape[1]
    sum_II = torch.zeros(size, size, device=model.device)
    num_tokens = 0
    for start in range(0, len(texts), DOCUMENTS_AT_ONCE):
        documents = [
            encode(model.tokenizer, [text])[0].ids[:context_length]
            for text in texts[start : start + DOCUMENTS_AT_ONCE]
        ]
        documents.sort(key=len)
        while documents:
            rows = max(
                1,
                sum(len(ids) * (count + 1) <= batch_tokens for count, ids in enumerate(documents)),
            )
            batch = pad(documents[:rows], device=model.device)
            documents = documents[rows:]
            with torch.no_grad(), capture(model, inputs=[module], stop_after_last=stop) as captured:
                model.network(**batch.arguments, use_cache=False)
            keys_MI = captured.inputs[module][batch.mask_BT.bool()].float()
            sum_II += keys_MI.T @ keys_MI
            num_tokens += len(keys_MI)
    return sum_II / num_tokens


def log_probabilities(model: EditableModel, probes: Sequence[Probe]) -> list[float]:
    """The mean log-probability of each answer's tokens, from one batch with logits at all
    positions. The probes are those of one record.
    """
    encoded = [encode_with_targets(model.tokenizer, [probe])[0] for probe in probes]
    batch = pad([sequence.ids[:-1] for sequence in encoded], device=model.device)
    with torch.no_grad():
        logits_BTV = logits_of(model, batch)
    means = []
    for row, sequence in enumerate(encoded):
        total = 0.0
        for offset, token in enumerate(sequence.target_ids):
            total += (
                logits_BTV[row, sequence.predicting.start + offset]
                .float()
                .log_softmax(-1)[token]
                .item()
            )
        means.append(total / len(sequence.target_ids))
    return means
