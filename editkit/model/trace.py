"""Causal tracing: at which layers the MLP's output at the subject's last token decides what the
model says.

Meng et al. 2022 (ROME, arXiv 2202.05262), section 2.1. For a fact that the model knows, the
subject's embeddings are corrupted by Gaussian noise; then, in the corrupted run, what the MLP of
one layer (or of a window around it) gives at the subject's last token is set back to what it gave
in the clean run. With p the probability of the fact's first token,

    total effect                  p_clean - p_corrupted
    indirect effect of a layer    p_restored - p_corrupted           its mean over facts and draws of noise is the average, AIE

All layers and draws of a fact run side by side. Differs from the authors' code: the noise's scale
is a multiple of the deviation of all embeddings, theirs of the embeddings of the subjects of a
dataset; both runs of a fact use the same draws for all layers, as theirs.

Shape letters: N facts, S draws of noise, L layers, B rows, T tokens, D width of the residual
stream, O of the MLP's output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from editkit.errors import ConfigError
from editkit.lazy import torch
from editkit.model.capture import capture, change_outputs
from editkit.model.tokens import encode_with_targets, fill, pad, subject_position
from editkit.types import EditRequest

if TYPE_CHECKING:
    from editkit.model.editable import EditableModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A prompt whose next token the model knows."""

    ids: tuple[int, ...]  # of the prompt
    subject: tuple[
        int, ...
    ]  # positions of the subject's tokens; the last is where states are restored
    token: int  # the answer's first


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """Effects in probability, on the CPU."""

    num_asked: int
    facts: tuple[Fact, ...]
    window: int
    clean_N: torch.Tensor
    corrupted_NS: torch.Tensor
    restored_NSL: torch.Tensor

    @property
    def average_L(self) -> torch.Tensor:
        """AIE: the average indirect effect of each layer."""
        return (self.restored_NSL - self.corrupted_NS[..., None]).mean(dim=(0, 1))

    @property
    def error_L(self) -> torch.Tensor:
        """Its standard error over facts; nan for one fact."""
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
    def rome_layer(self) -> int:
        """The layer of the largest effect; the last, behind which nothing reads the subject, is
        left out.
        """
        return int(self.average_L[:-1].argmax())

    @property
    def memit_layers(self) -> tuple[int, ...]:
        """As many as five layers up to that one: published MEMIT layers end where ROME's is."""
        return tuple(range(max(0, self.rome_layer - 4), self.rome_layer + 1))


def known_facts_of(
    model: EditableModel, requests: Sequence[EditRequest], *, tokens_at_once: int = 4096
) -> tuple[Fact, ...]:
    """Of these requests the ones whose old target the unedited model says: its first token is the
    most probable one.

    Raises ConfigError where there are none.
    """
    asked = [request for request in requests if request.target_old]
    found: list[Fact] = []
    pairs = [(request.full_prompt, request.target_old or "") for request in asked]
    for request, sequence in zip(asked, encode_with_targets(model.tokenizer, pairs), strict=True):
        place = fill(request.prompt, request.subject)
        last = subject_position(sequence, place)
        first = next(
            index
            for index in range(sequence.encoded.num_special, last + 1)
            if sequence.encoded.spans[index][1] > place.subject_start
        )
        found.append(
            Fact(
                ids=sequence.ids[: sequence.start],
                subject=tuple(range(first, last + 1)),
                token=sequence.target_ids[0],
            )
        )
    known: list[Fact] = []
    for some in _batches(found, tokens_at_once=tokens_at_once):
        probabilities_BV = _probabilities(model, some)
        known += [
            fact
            for fact, greedy in zip(some, probabilities_BV.argmax(-1).tolist(), strict=True)
            if greedy == fact.token
        ]
    if not known:
        raise ConfigError(
            f"--trace: {model.name} knows none of the {len(requests)} facts (the most probable "
            "token after their prompts is not the old "
            "target's) - choose another dataset, more edits, or a model with trained weights."
        )
    return tuple(known)


def trace(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    num_asked: int,
    window: int = 1,
    noise: float = 3.0,
    draws: int = 3,
    seed: int = 0,
    tokens_at_once: int = 4096,
) -> Trace:
    """The effects of every layer. The model is read only.

    Args:
        window: layers that are restored together, around each.
        noise: in standard deviations of the embeddings.
        tokens_at_once: of a pass over facts, padding included; memory, no result beyond rounding.
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
        [each for each in layers if layer - (window - 1) // 2 <= each <= layer + window // 2]
        for layer in layers
    ]
    clean, corrupted, restored = [], [], []
    start = 0
    for some in _batches(facts, tokens_at_once=tokens_at_once):
        noises = drawn[start : start + len(some)]
        start += len(some)
        batch = pad([fact.ids for fact in some], device=model.device)
        with torch.no_grad(), capture(model, outputs=mlps, stop_after_last=False) as captured:
            hidden_BTD = model.final_hidden(batch)
        clean += _of_tokens(model, hidden_BTD, some).tolist()
        ends = torch.tensor([fact.subject[-1] for fact in some], device=model.device)
        states = {
            mlp: captured.outputs[mlp][torch.arange(len(some), device=model.device), ends]
            for mlp in mlps
        }
        del captured
        for fact_index, (fact, noise_SKD) in enumerate(zip(some, noises, strict=True)):
            # Row 0 of a draw is only corrupted, row 1 + l has layer l restored.
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
        num_asked=num_asked,
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
    """(S * (1 + L),): the token's probability, draw by draw; in a draw's first row nothing is
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
        at = [
            draw * per_draw + 1 + centre
            for draw in range(num_draws)
            for centre, window in enumerate(windows)
            if layer in window
        ]
        rows = torch.tensor(at, device=model.device)

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
    """(B,) float32, on the CPU: the probability of each fact's token behind its prompt."""
    rows = torch.arange(len(facts), device=hidden_BTD.device)
    last = torch.tensor([len(fact.ids) - 1 for fact in facts], device=hidden_BTD.device)
    tokens = torch.tensor([fact.token for fact in facts], device=hidden_BTD.device)
    with torch.no_grad():
        log_p_BV = model.hidden_to_logits(hidden_BTD[rows, last]).float().log_softmax(-1)
    return log_p_BV[rows, tokens].exp().cpu()


def _probabilities(model: EditableModel, facts: Sequence[Fact]) -> torch.Tensor:
    with torch.no_grad():
        hidden_BTD = model.final_hidden(pad([fact.ids for fact in facts], device=model.device))
        rows = torch.arange(len(facts), device=hidden_BTD.device)
        last = torch.tensor([len(fact.ids) - 1 for fact in facts], device=hidden_BTD.device)
        return model.hidden_to_logits(hidden_BTD[rows, last]).float().softmax(-1)


def _batches(facts: Sequence[Fact], *, tokens_at_once: int) -> list[list[Fact]]:
    """In their order; each at most so many tokens, padding included, or one fact."""
    found: list[list[Fact]] = []
    longest = 0
    for fact in facts:
        longest = max(longest, len(fact.ids))
        if not found or (len(found[-1]) + 1) * longest > tokens_at_once:
            found.append([])
            longest = len(fact.ids)
        found[-1].append(fact)
    return found
