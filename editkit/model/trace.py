"""Causal tracing: the layers whose MLP output at the subject's last token determines the
prediction.

Source: Meng et al. 2022 (ROME, arXiv 2202.05262), section 2.1. Gaussian noise corrupts the
subject's embeddings of a fact that the model knows. In the corrupted run, the MLP output of one
layer, or of a window of layers around it, at the subject's last token is restored to its value in
the clean run. With p the probability of the first token of the fact's answer,

    total effect                  p_clean - p_corrupted
    indirect effect of a layer    p_restored - p_corrupted

The mean of the indirect effect over facts and noise draws is the average indirect effect (AIE).

The peak is reported wherever it is, but the first two layers are never suggested for editing. The
noise is on the embeddings, and the MLP of a first layer is still a function of little else than the
embedding at its position. Restoring it gives the clean token back: it undoes the corruption instead
of retrieving a fact, so that a peak there is no evidence of storage. An edit there also has nearly
the same key for every subject that ends in the same token.

All layers and draws of a fact run in one batch. As in the authors' code, the same draws serve all
layers of a fact. Difference from the authors' code: the scale of the noise is a multiple of the
standard deviation of all embeddings, theirs of the embeddings of a dataset's subjects.

Shape letters: N facts, S draws of noise, L layers, B rows, T tokens, D width of the residual
stream, O of the MLP's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.lazy import torch
from editkit.model.capture import capture, change_outputs
from editkit.model.tokens import encode_with_targets, fill, pad, subject_positions
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel

EARLY = 2  # the first layers, which are not suggested for editing


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A prompt whose next token the model predicts correctly."""

    ids: tuple[int, ...]  # of the prompt
    subject: tuple[int, ...]  # positions of the subject's tokens; states are restored at the last
    token: int  # the first token of the answer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Effects on the probability, on the CPU."""

    num_requests: int  # before unknown facts were left out
    facts: tuple[Fact, ...]
    window: int
    clean_N: torch.Tensor
    corrupted_NS: torch.Tensor
    restored_NSL: torch.Tensor

    @property
    def average_L(self) -> torch.Tensor:
        """The average indirect effect (AIE) of each layer."""
        return (self.restored_NSL - self.corrupted_NS[..., None]).mean(dim=(0, 1))

    @property
    def error_L(self) -> torch.Tensor:
        """The standard error of the AIE over facts; nan for one fact."""
        by_fact_NL = (self.restored_NSL - self.corrupted_NS[..., None]).mean(dim=1)
        return (
            by_fact_NL.std(dim=0) / len(self.facts) ** 0.5
            if len(self.facts) > 1
            else torch.full_like(by_fact_NL[0], torch.nan)
        )

    @property
    def total_effect(self) -> float:
        return float((self.clean_N[:, None] - self.corrupted_NS).mean())

    @property
    def peak(self) -> int:
        """The layer with the largest AIE, wherever it is, except the last one: no later block reads
        the subject's state.
        """
        return int(self.average_L[:-1].argmax())

    @property
    def first_suggested(self) -> int:
        """The first layer that is suggested: the first two are left out if others remain."""
        return min(EARLY, max(0, len(self.average_L) - 2))

    @property
    def rome_layer(self) -> int:
        """The layer with the largest AIE beyond the first layers and before the last one."""
        return self.first_suggested + int(self.average_L[self.first_suggested : -1].argmax())

    @property
    def memit_layers(self) -> tuple[int, ...]:
        """Up to five layers that end at `rome_layer`, as the published MEMIT layers do. None of
        them is one of the first layers.
        """
        return tuple(range(max(self.first_suggested, self.rome_layer - 4), self.rome_layer + 1))


def facts_of(model: EditableModel, requests: Sequence[EditRequest]) -> tuple[Fact, ...]:
    """The facts of these requests, all of which have an old target that the model knows
    (`editkit.evaluation.known`).
    """
    facts: list[Fact] = []
    probes = [request.probe(answer=request.target_old or "") for request in requests]
    sequences = encode_with_targets(model.tokenizer, probes, chat=model.chat)
    for request, sequence in zip(requests, sequences, strict=True):
        facts.append(
            Fact(
                ids=sequence.ids[: sequence.start],
                subject=subject_positions(sequence, fill(request.prompt, request.subject)),
                token=sequence.target_ids[0],
            )
        )
    return tuple(facts)


def trace(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    num_requests: int,
    window: int = 1,
    noise: float = 3.0,
    draws: int = 3,
    seed: int = 0,
    tokens_at_once: int = 4096,
) -> Trace:
    """The effects of every layer. The model does not change.

    Args:
        num_requests: the number of requests from which `facts` were selected.
        window: number of neighbouring layers that are restored together.
        noise: in standard deviations of the embeddings.
        tokens_at_once: tokens of a pass over facts, including padding. It bounds memory and changes
            results only by rounding.
    """
    embedding = model.network.get_input_embeddings()
    name = next(name for name, module in model.network.named_modules() if module is embedding)
    width, scale = embedding.weight.shape[1], noise * float(embedding.weight.float().std())
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        scale * torch.randn(draws, len(fact.subject), width, generator=generator) for fact in facts
    ]
    layers = range(model.num_layers)
    mlps = [model.family.mlp(layer) for layer in layers]
    windows = [
        [other for other in layers if layer - (window - 1) // 2 <= other <= layer + window // 2]
        for layer in layers
    ]
    clean, corrupted, restored = [], [], []
    start = 0
    for batch_facts in _batches(facts, tokens_at_once=tokens_at_once):
        noises = drawn[start : start + len(batch_facts)]
        start += len(batch_facts)
        batch = pad([fact.ids for fact in batch_facts], device=model.device)
        with torch.no_grad(), capture(model, outputs=mlps, stop_after_last=False) as captured:
            hidden_BTD = model.final_hidden(batch)
        clean += _of_tokens(model, hidden_BTD, batch_facts).tolist()
        ends = torch.tensor([fact.subject[-1] for fact in batch_facts], device=model.device)
        states = {
            mlp: captured.outputs[mlp][torch.arange(len(batch_facts), device=model.device), ends]
            for mlp in mlps
        }
        del captured
        for fact_index, (fact, noise_SKD) in enumerate(zip(batch_facts, noises, strict=True)):
            # In row 0 of a draw nothing is restored; in row 1 + l, layer l is restored.
            probabilities = _corrupted(
                model,
                name,
                fact,
                noise_SKD,
                {mlp: states[mlp][fact_index] for mlp in mlps},
                windows,
            )
            probabilities_SR = probabilities.unflatten(0, (draws, model.num_layers + 1))
            corrupted.append(probabilities_SR[:, 0])
            restored.append(probabilities_SR[:, 1:])
    return Trace(
        num_requests=num_requests,
        facts=tuple(facts),
        window=window,
        clean_N=torch.tensor(clean),
        corrupted_NS=torch.stack(corrupted),
        restored_NSL=torch.stack(restored),
    )


def _corrupted(
    model: EditableModel,
    embedding: str,
    fact: Fact,
    noise_SKD: torch.Tensor,
    states: dict[str, torch.Tensor],
    windows: Sequence[Sequence[int]],
) -> torch.Tensor:
    """(S * (1 + L),): the token's probability, draw by draw. In the first row of a draw nothing is
    restored.
    """
    num_draws, per_draw = len(noise_SKD), 1 + len(windows)
    batch = pad([fact.ids] * (num_draws * per_draw), device=model.device)
    noise_BKD = noise_SKD.repeat_interleave(per_draw, dim=0)
    columns = torch.tensor(fact.subject, device=model.device)
    end = fact.subject[-1]

    def corrupt(output_BTD: torch.Tensor) -> torch.Tensor:
        changed_BTD = output_BTD.clone()
        changed_BTD[:, columns] += noise_BKD.to(output_BTD)
        return changed_BTD

    def restorer(layer: int, state_O: torch.Tensor) -> tuple[str, object]:
        restored_rows = [
            draw * per_draw + 1 + centre
            for draw in range(num_draws)
            for centre, window in enumerate(windows)
            if layer in window
        ]
        rows = torch.tensor(restored_rows, device=model.device)

        def restore(output_BTO: torch.Tensor) -> torch.Tensor:
            changed_BTO = output_BTO.clone()
            changed_BTO[rows, end] = state_O.to(output_BTO)
            return changed_BTO

        return model.family.mlp(layer), restore

    changes = dict(
        restorer(layer, states[model.family.mlp(layer)]) for layer in range(len(windows))
    )
    with torch.no_grad(), change_outputs(model, {embedding: corrupt, **changes}):  # type: ignore[dict-item]
        hidden_BTD = model.final_hidden(batch)
    return _of_tokens(model, hidden_BTD, [fact] * len(hidden_BTD))


def _of_tokens(
    model: EditableModel, hidden_BTD: torch.Tensor, facts: Sequence[Fact]
) -> torch.Tensor:
    """(B,) float32, on the CPU: the probability of each fact's token after its prompt."""
    rows = torch.arange(len(facts), device=hidden_BTD.device)
    last = torch.tensor([len(fact.ids) - 1 for fact in facts], device=hidden_BTD.device)
    tokens = torch.tensor([fact.token for fact in facts], device=hidden_BTD.device)
    with torch.no_grad():
        log_p_BV = model.hidden_to_logits(hidden_BTD[rows, last]).float().log_softmax(-1)
    return log_p_BV[rows, tokens].exp().cpu()


def _batches(facts: Sequence[Fact], *, tokens_at_once: int) -> list[list[Fact]]:
    """The facts in order, as batches of one fact or at most so many tokens, including padding."""
    batches: list[list[Fact]] = []
    longest = 0
    for fact in facts:
        longest = max(longest, len(fact.ids))
        if not batches or (len(batches[-1]) + 1) * longest > tokens_at_once:
            batches.append([])
            longest = len(fact.ids)
        batches[-1].append(fact)
    return batches
